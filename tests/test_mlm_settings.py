"""Settings of the language models' commands: what --help lists, and values that are empty."""

import dataclasses
import re

import pytest
from helpers import ROOT

from mlm import glue, pretrain
from mlm.fields import setting
from mlm.modeling import LionBertConfig
from mlm.settings import override, typed
from mlm.tasks import Task

COMMANDS = {
    "pretrain": (pretrain, {"": pretrain.Settings, "model.": LionBertConfig}),
    "glue": (glue, {"": glue.Settings, "tasks.TASK.": Task}),
}


def own_fields(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.name in kind.__annotations__]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_setting(name, ending):
    module, sections = COMMANDS[name]
    ended = ending(module.main, ["--help"])
    assert ended.code == 0
    lines = ended.out[ended.out.index("settings, with their defaults:") :].splitlines()[1:]
    shown = {}
    for line in lines:
        key, default, meaning = re.fullmatch(r"  ([\w.]+)=(.*?)  +(\S.*)", line).groups()
        shown[key] = (default, meaning)
    expected = [prefix + f.name for prefix, kind in sections.items() for f in own_fields(kind)]
    assert list(shown) == expected
    assert len(expected) > 15
    required = {key for key, (default, _) in shown.items() if default == "VALUE"}
    assert required >= {"data"}
    assert "output" not in required


def test_defaults_are_shown_as_they_are_given(ending):
    """What --help shows, given as arguments, changes nothing."""
    lines = ending(pretrain.main, ["--help"]).out.split("defaults:\n")[1].splitlines()
    given = [re.split(r"  +", line.strip())[0] for line in lines if "VALUE" not in line]
    values = override({"data": "x", "lr": 1, "model": {}}, given)
    model = values.pop("model")
    settings = typed(pretrain.Settings, {**values, "model": {}}, "test")
    assert settings == pretrain.Settings(data="x", lr=1, model={})
    model = LionBertConfig(**model)
    assert model.to_diff_dict() == LionBertConfig().to_diff_dict()


@dataclasses.dataclass
class Example:
    path: str = setting("must be given")
    text: str = setting("a text", "default")
    maybe: str | None = setting("a text or null", "default")
    count: int = setting("a number", 3)


def test_an_empty_value_is_an_empty_text():
    found = typed(Example, override({"path": "x"}, ["text=", "maybe="]), "test")
    assert (found.text, found.maybe) == ("", None)
    with pytest.raises(ValueError, match="count in test must be int, not None"):
        typed(Example, override({"path": "x"}, ["count="]), "test")
    with pytest.raises(ValueError, match="test lacks path: give path=VALUE"):
        typed(Example, override({}, ["path="]), "test")


def test_pretraining_takes_an_empty_output(corpus, ending):
    arguments = [f"data={corpus}", "output=", "device=cpu", "steps=0"]
    ended = ending(pretrain.main, [str(ROOT / "mlm" / "configs" / "tiny.yaml"), *arguments])
    assert ended.code == 2
    assert "steps must be at least 1" in ended.err


def test_padding_is_that_of_the_data(corpus, ending):
    tiny = str(ROOT / "mlm" / "configs" / "tiny.yaml")
    ended = ending(pretrain.main, [tiny, f"data={corpus}", "device=cpu", "model.pad_token_id=3"])
    assert ended.code == 2
    assert "The model pads with 3 and the data's tokeniser with 0" in ended.err
