import pytest
import torch

from curves import ORDERS, column_snake, inverse, num_curves, row_snake, scan_curves

GRIDS = [(1, 1), (1, 5), (5, 1), (2, 3), (7, 7), (14, 9), (3, 17), (16, 16)]


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


def steps(curve: torch.Tensor, w: int) -> torch.Tensor:
    """How far each step goes, rows and columns `[2, N - 1]`."""
    return torch.stack([(curve // w).diff().abs(), (curve % w).diff().abs()])


@pytest.mark.parametrize("h, w", GRIDS)
@pytest.mark.parametrize("order", [*ORDERS, "S+Hilbert", "Snakes+Diagonal+Morton"])
def test_every_curve_visits_every_patch_once(order, h, w):
    curves = scan_curves(order, (h, w), num_prefix=1)
    assert curves.shape == (num_curves(order), 1 + h * w)
    assert curves.dtype == torch.int64
    assert (curves[:, 0] == 0).all()
    assert curves.sort(1).values.equal(torch.arange(1 + h * w).expand(len(curves), -1))


def test_number_of_curves():
    counts = {order: num_curves(order) for order in ("Normal", *ORDERS)}
    assert counts == {"Normal": 1, "S": 2, "Snakes": 4, "Diagonal": 2, "Morton": 2, "Hilbert": 2}
    assert num_curves("Snakes+Diagonal+Hilbert") == 8


def test_curves_of_an_order_differ_in_both_directions():
    curves = scan_curves("Snakes+Diagonal+Morton+Hilbert", (4, 6))
    both = torch.cat([curves, curves.flip(1)])
    assert len(both.unique(dim=0)) == 20


def test_of_the_eight_snakes_four_differ():
    grid = torch.arange(20).view(4, 5)
    views = [g for v in (grid, grid.T) for u in (v, v.flip(0)) for g in (u, u.flip(1))]
    eight = torch.stack([g.flatten()[row_snake(*g.shape)] for g in views])
    four = scan_curves("Snakes", (4, 5))
    assert torch.cat([four, four.flip(1)]).unique(dim=0).equal(eight.unique(dim=0))


def test_joined_orders_keep_their_curves():
    joined = scan_curves("Hilbert+S", (4, 6), num_prefix=2)
    parts = [scan_curves(order, (4, 6), num_prefix=2) for order in ("Hilbert", "S")]
    assert joined.equal(torch.cat(parts))


def test_diagonal_by_hand():
    first, second = scan_curves("Diagonal", (3, 3)).tolist()
    assert first == [0, 1, 3, 6, 4, 2, 5, 7, 8]
    assert second == [2, 1, 5, 8, 4, 0, 3, 7, 6]


def test_morton_by_hand():
    first, second = scan_curves("Morton", (4, 4)).tolist()
    assert first == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert second == [0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15]


def test_hilbert_by_hand():
    first, second = scan_curves("Hilbert", (4, 4)).tolist()
    assert first == [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert second == [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 13, 9, 8, 12]


@pytest.mark.parametrize("order", ["Snakes", "Diagonal", "Hilbert"])
def test_steps_lead_to_neighbours(order):
    for h in range(1, 13):
        for w in range(1, 13):
            for curve in scan_curves(order, (h, w)):
                assert h * w == 1 or steps(curve, w).max() == 1, (h, w)


def test_hilbert_has_no_diagonal_steps_on_even_grids():
    for h in range(2, 21, 2):
        for w in range(2, 21, 2):
            for curve in scan_curves("Hilbert", (h, w)):
                assert (steps(curve, w).sum(0) == 1).all(), (h, w)


def test_hilbert_keeps_neighbours_close():
    """Near patches are near on the curve: far nearer than on a snake."""
    h = w = 32
    distances = {}
    for order in ("S", "Hilbert"):
        step = inverse(scan_curves(order, (h, w))[0]).view(h, w)
        distances[order] = step.diff(dim=0).abs().double().median()
    assert distances["Hilbert"] < distances["S"] / 4


@pytest.mark.parametrize("order", ["Z", "S+Z", "S+Normal", "", "S+"])
def test_unknown_order(order):
    with pytest.raises(ValueError, match=r"Unknown order '.*': choose one of Normal, S, "):
        scan_curves(order, (3, 4))
