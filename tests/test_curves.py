import pytest
import torch

from curves import column_snake, inverse, row_snake, scan_curves


def test_row_snake_by_hand():
    assert row_snake(3, 4).tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]


def test_column_snake_by_hand():
    assert column_snake(3, 4).tolist() == [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]


@pytest.mark.parametrize("h, w", [(1, 1), (1, 5), (5, 1), (2, 3), (7, 7), (14, 9)])
@pytest.mark.parametrize("snake", [row_snake, column_snake])
def test_snakes_step_to_neighbours_and_visit_every_patch_once(snake, h, w):
    curve = snake(h, w)
    assert curve.sort().values.tolist() == list(range(h * w))
    rows, columns = curve // w, curve % w
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()


def test_inverse_undoes_every_curve():
    curves = scan_curves("S", (5, 8), num_prefix=2)
    assert torch.equal(curves.gather(1, inverse(curves)), torch.arange(42).expand(2, -1))


def test_prefix_tokens_come_first():
    curves = scan_curves("S", (3, 4), num_prefix=2)
    assert curves.shape == (2, 14)
    assert curves[:, :3].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_normal_order_is_token_order():
    assert scan_curves("Normal", (3, 4)) is None


def test_unknown_order():
    with pytest.raises(ValueError, match="Unknown order 'Z': choose one of Normal, S"):
        scan_curves("Z", (3, 4))
