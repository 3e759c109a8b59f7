"""common/flags.py: values by layers, and rules beside the flag."""
import dataclasses
import sys

import pytest
import torch

import ddgan
import ddim
import ddpm
import ldm
import shortcut_mcmc
import vdm
from common import flags
from common.flags import option


def parsed(script, given, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *given.split()])
    return flags.parse(script.__name__, script.FLAGS, script.RECIPES, script.__doc__)


# ---------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("given,iters,minutes", [
    ("", 3000, 2.5), ("--iters 20000", 20000, 0), ("--minutes 9", 100_000, 9),
    ("--iters 5 --minutes 1", 5, 1)])
def test_an_end_that_is_given_replaces_the_recipe_s(given, iters, minutes, monkeypatch):
    """--iters alone is not cut short by the recipe's minutes, nor --minutes by its updates."""
    c = parsed(ddpm, f"--train {given}", monkeypatch)
    assert (c.iters, c.minutes) == (iters, minutes)


@pytest.mark.parametrize("folder,T,size,lr,name", [
    ("CelebA_HQ", 2, 256, 2e-4, "CelebA_HQ"), ("lsun", 4, 256, 1.6e-4, "lsun"),
    ("photos", 4, 0, 3e-4, "photos"), ("./cifar10", 4, 0, 3e-4, "pictures-cifar10"),
    ("T=1", 4, 0, 3e-4, "T=1")])  # a circumstance is no folder
def test_a_folder_takes_the_recipe_of_its_own_name(folder, T, size, lr, name, monkeypatch,
                                                   tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    monkeypatch.setattr(flags, "_without_gpu", lambda given: False)
    c = parsed(ddgan, f"--train --data {folder}", monkeypatch)
    assert (c.T, c.size, c.lr, c.run.name) == (T, size, lr, f"ddgan-{name}")
    assert c.flip  # pictures, and both papers'


@dataclasses.dataclass
class Knobs:
    T: int = option(4, "steps", low=1)
    share: float = option(0.5, "a number")
    part: int = option(0, "of T", low=0, high="T")


RECIPES = {"": dict(batch=8, part=lambda c: c.T // 2), "T=2": dict(batch=16, share=1),
           "digits": dict(lr=0.1, T=2), "swirl": dict(batch=32), "pictures": dict(batch=64)}
KNOBS = (Knobs, flags.Training)


def test_rows_are_laid_in_the_table_s_order_and_the_user_s_flags_last():
    def laid(**given):
        c = flags.settings("ddpm", KNOBS, RECIPES, device="cpu", **given)
        return c.T, c.batch, c.share, c.part, c.lr

    assert laid() == (2, 16, 1.0, 1, 0.1)  # digits make T 2, which brings its row
    assert laid(T=6) == (6, 8, 0.5, 3, 0.1)  # as given; a value by the others' values
    assert laid(T=2, data="swirl") == (2, 32, 1.0, 1, 0.0)  # the data's row stands below T's
    assert laid(batch=1, share=2, part=0) == (2, 1, 2.0, 0, 0.1)
    c = flags.settings("ddpm", KNOBS, RECIPES, device="cpu")
    assert isinstance(c.share, float)
    assert flags.default(c, "batch") == 8 and flags.default(c, "T") == 4


@pytest.mark.parametrize("wrong,words", [
    (dict(eat=1), "no flag --eat"), (dict(batch=0), "at least 1"),
    (dict(precision="fp8"), "--precision fp8 is not of"), (dict(attention=8), "not a list"),
    (dict(classes="airplane"), "not a list or tuple"), (dict(data=3), "--data 3 is not text"),
    (dict(eta=None), "--eta None is not a number"), (dict(seed=2.7), "not a whole number"),
    (dict(multipliers=[1, "2"]), "not a whole number"), (dict(sigma_hat="no"), "True or False"),
    (dict(lr=True), "--lr True is not a number"), (dict(data="swirl", heads=2), "for pictures"),
    (dict(checkpoint="a.pt", T=50), "--T is for training: the checkpoint says what it is"),
    (dict(checkpoint="a.pt", steps=5), "load has no use for steps")])
def test_settings_from_python_are_checked(wrong, words):
    with pytest.raises(ValueError, match=words):
        flags.settings("ddim", ddim.FLAGS, ddim.RECIPES, **wrong)


def test_settings_from_python_take_what_means_the_same(tmp_path):
    c = flags.settings("ddim", ddim.FLAGS, ddim.RECIPES, multipliers=[1, 2], lr=1, label=3,
                       run=tmp_path, device=torch.device("cpu"), encode=[tmp_path / "a.png"])
    assert (c.multipliers, c.lr, c.label, c.run) == ((1, 2), 1.0, "3", tmp_path)
    assert c.device == torch.device("cpu") and c.encode == (tmp_path / "a.png",)


# ----------------------------------------------------------------------------------------- rules
@dataclasses.dataclass
class Ruled:
    on: bool = option(False, "a switch")
    T: int = option(0, "steps; 0: no end", low=0)
    steps: int = option(0, "of T", "sample", low=1, high="T")
    weights: tuple = option((), "of each of T", one_for_each="T")
    only: int = option(0, "with on", needs="on")
    sampled: int = option(0, "of models with on", "sample", needs="on")
    counted: int = option(0, "with T", needs="T")
    alone: bool = option(False, "idles steps", "sample", idles="steps seed")


@pytest.mark.parametrize("script", (ddpm, ddim, ddgan, ldm, vdm, shortcut_mcmc),
                         ids=lambda script: script.__name__)
def test_a_default_that_is_given_is_as_if_it_were_not(script, monkeypatch):
    """And "--" is the value of no flag: argparse would make an empty list of it."""
    name, groups = script.__name__, (*script.FLAGS, flags.Shared)
    fields = {f.name: f for group in groups for f in dataclasses.fields(group)}
    for action in ("--train", "--sample"):
        bare = vars(parsed(script, action, monkeypatch))
        for field in fields.values():
            use, value = field.metadata["use"], bare[field.name]
            if action[2:] not in use or field.metadata["acts"] or isinstance(value, bool) \
                    or field.metadata["needs"] \
                    or flags.unfit(field.metadata, value if isinstance(value, tuple) else (value,)):
                continue  # 0 for what is settled later cannot be given
            monkeypatch.setattr(sys, "argv", [f"{name}.py", action, "--" + field.name.replace(
                "_", "-"), flags.text(value) if value != () else ""])
            c = vars(flags.parse(name, script.FLAGS, script.RECIPES, ""))
            for key in bare.keys() - {"given", "instead", "iters", "minutes"}:
                assert c[key] == bare[key], (field.name, key)
    for field in fields.values():
        flag = "--" + field.name.replace("_", "-")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--train", f"{flag}=--"])
        with pytest.raises(SystemExit) as stopped:
            flags.parse(name, script.FLAGS, script.RECIPES, "")
        assert stopped.value.code == 2


@pytest.mark.parametrize("given,words", [
    ("--train --only 3", "--only does nothing without --on: leave it out"),
    ("--train --on --only 3", None),
    ("--train --counted 3", "--counted does nothing with --T 0: leave it out"),
    ("--train --sample --T 5 --steps 6", "--steps 6 is more than --T 5: choose from 1 to 5"),
    ("--train --sample --T 5 --steps 5", None),
    ("--train --sample --steps 600", None),  # no bound where T is 0
    ("--train --T 3 --weights 1,2", "--weights has 2 numbers for T = 3: give one for each"),
    ("--train --T 2 --weights 1,2", None), ("--train --T 2 --weights ,", None),
    ("--train --sample --alone --steps 3", "--steps does nothing with --alone: leave it out"),
    ("--train --sample --alone --seed 3", "--seed does nothing with --alone: leave it out"),
    ("--train --sample --alone --seed 0", None),  # as it is anyway: a loop over values may run
    ("--train --sample --sampled 0", None),
    ("--train --data swirl --size 8", "--size is for pictures, and swirl has points"),
    ("--sample --sampled 3", None),  # what the model has is not known yet
])
def test_a_flag_that_does_nothing_or_passes_another_s_bound_is_an_error(given, words, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", *given.split()])

    def parse():
        return flags.parse("x", (Ruled,), {}, "")
    if words is None:
        parse()
    else:
        with pytest.raises(SystemExit) as stopped:
            parse()
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_flag_of_sampling_says_that_the_model_must_be_another(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--sample", "--sampled", "3"])
    c = flags.parse("x", (Ruled,), {}, "")
    with pytest.raises(SystemExit):
        flags.rules(c)
    assert "--sampled needs a model trained with --on" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the GAN's
@pytest.mark.parametrize("given,want", [
    ("", 600), ("--pretrain 50", 12), ("--pretrain 9", 2), ("--pretrain 0", 0),
    ("--pretrain 200 --pretrain-z 200", 200), ("--T 2", 600), ("--T 1", 0)])
def test_nearest_latents_have_a_quarter_of_a_short_pretraining(given, want, monkeypatch):
    assert parsed(ddgan, f"--train {given}", monkeypatch).pretrain_z == want


# --------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("script,given,dtype", [
    (ddpm, "", torch.bfloat16), (ddpm, "--precision fp32", torch.float32),
    (ddpm, "--predict mean", torch.float32), (ddgan, "--data gaussians", torch.float32),
    (ddim, "--data swirl --predict eps", torch.float32), (ddgan, "", torch.bfloat16)])
def test_bf16_is_used_where_it_resolves_what_counts(script, given, dtype, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    given = f"--train --device cpu {given}"
    c = parsed(script, given, monkeypatch)
    assert c.precision == {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    with flags.autocast(c):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype
    if dtype == torch.float32 and "fp32" not in given:
        with pytest.raises(SystemExit) as stopped:
            parsed(script, f"{given} --precision bf16", monkeypatch)
        assert stopped.value.code == 2
        assert "--precision bf16 is too coarse" in capsys.readouterr().err


@pytest.mark.parametrize("gpus, processes, words", (
    (0, 1, "--device cuda: PyTorch finds none here; leave it out"),
    (0, 2, "--device cuda: PyTorch finds none here; leave it out"),
    (1, 2, "--device cuda: 2 processes, and PyTorch finds 1 here; start fewer"), (2, 2, "")))
def test_a_device_that_is_not_there(gpus, processes, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "1")
    if not words:
        assert flags.device("cuda") == torch.device("cuda:1")
        return
    with pytest.raises(ValueError, match=words):
        flags.device("cuda")


# ---------------------------------------------------------------------------- what a graph hangs on
def test_values_are_plain_and_leave_out_what_changes_no_step():
    c = flags.settings("ddpm", ddpm.FLAGS, ddpm.RECIPES, device="cpu")
    c.labels, c.shape = 3, (1, 8, 8)
    before = flags.values(c)
    assert {("guidance", 1.0), ("labels", 3), ("shape", (1, 8, 8))} <= set(before)
    hash(before)
    c.seed, c.n, c.out, c.run, c.checkpoint, c.sample = 9, 5, "a.png", "elsewhere", "x.pt", True
    assert flags.values(c) == before
    for name, value in dict(guidance=2.0, variance="beta-tilde", knob=1, many=[1, 2]).items():
        setattr(c, name, value)
        assert flags.values(c) != before
        before = flags.values(c)
