"""ldm.py's prompts, edits and walk: a model of light and dark pictures that learns their captions.

Its first two stages are in test_ldm.py; captions themselves in test_words.py.
"""
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import conftest
import ldm
from common import autoencoder, data, flags, metrics, pictures, unet, words
from common.draws import START
from common.schedules import alpha_bar
from conftest import SMALL, run
from kernels.noise import randn
from test_data import folder
from test_scripts import losses, same, weights

SIDES = ("left", "right")


def settings(**changes):
    return conftest.settings(ldm, **dict(vocabulary=(), longest=0) | changes)


def halves():
    """Files of 160 pictures, light on one side and dark on the other, and what they are called."""
    files = {}
    generator = torch.Generator().manual_seed(0)
    for i in range(160):
        x = torch.full((8, 8, 3), 30)
        x[:, 4 * (i % 2):4 * (i % 2) + 4] = 225
        x += torch.randint(-25, 26, x.shape, generator=generator)
        out = io.BytesIO()
        Image.fromarray(x.byte().numpy()).save(out, "png")
        files |= {f"{i:03}.png": out.getvalue(),
                  f"{i:03}.txt": f"light at the {SIDES[i % 2]}".encode()}
    return files


GIVEN = ["--data", "halves", *SMALL["ldm"], "--captions"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with such pictures, a model of them, and pictures to edit."""
    here = tmp_path_factory.mktemp("words")
    folder(here / "halves", halves())
    run(here, "ldm", "--train", "--iters", 250, *GIVEN, "--run", "said")
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (8, 8, 3), generator=generator).byte().numpy()
    Image.fromarray(x).save(here / "image.png")
    Image.fromarray(x).resize((20, 30)).convert("L").save(here / "large.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    mask[3, 1] = 255  # one pixel, whose latent is then no longer known
    Image.fromarray(mask).save(here / "mask.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(here / "black.png")
    return here


def drawn(place, *given, out="out.npz"):
    """What --sample of the model draws, uint8 (N, H, W, C)."""
    run(place, "ldm", "--sample", "--run", "said", "--out", out, *given)
    return np.load(place / out)["arr_0"]


def light_at(x):
    """Which side of pictures (N, H, W, C) is lighter: 0 left, 1 right."""
    return (x[:, :, 4:].mean((1, 2, 3)) > x[:, :, :4].mean((1, 2, 3))).astype(int)


# ----------------------------------------------------------------------------------------- prompts
def test_pictures_are_what_the_prompt_says(place):
    """A row each; also where part of the sentence is left out, and turned around by --negative."""
    x = drawn(place, "--prompt", "light at the left", "--prompt", "light at the right", "--n", 16,
              "--steps", 10)
    assert x.shape == (32, 8, 8, 3)
    assert (light_at(x) == np.repeat([0, 1], 16)).mean() > 0.95
    x = drawn(place, "--prompt", "Right!", "--prompt", "LEFT", "--n", 40, "--steps", 10)
    assert (light_at(x) == np.repeat([1, 0], 40)).mean() > 0.65
    # what is asked for may be either, and guidance leads away from one
    given = ["--prompt", "light at the", "--guidance", 4, "--n", 64, "--steps", 10]
    left = drawn(place, *given, "--negative", "light at the left")
    right = drawn(place, *given, "--negative", "light at the right")
    assert (abs(left.astype(int) - right) > 20).mean() > 0.05
    x = drawn(place, "--n", 64, "--steps", 10)  # says nothing: both
    assert 0.15 < light_at(x).mean() < 0.85


def test_a_prompt_s_pictures_are_the_same_whatever_else_is_drawn(place):
    given = ["--steps", 4, "--guidance", 2, "--eta", 1]
    few = drawn(place, "--prompt", "light at the right", "--n", 3, *given).astype(int)
    both = ["--prompt", "left", "--prompt", "light at the right"]
    many = drawn(place, *both, "--n", 5, *given).astype(int)
    assert (abs(few - many[5:8]) <= 1).mean() > 0.999
    c, net = ldm.load(place / "said" / "checkpoint.pt", device="cpu", precision="fp32", guidance=2,
                      eta=1)
    one = ldm.sample(c, net, 3, 2, 4, prompt="light at the right")
    assert (abs(pictures.to_uint8(one).permute(0, 2, 3, 1).numpy() - many[8:]) <= 1).mean() > 0.999
    # a prompt each
    each = ldm.sample(c, net, 3, 2, 4, prompt=["light at the right", "left"])
    assert_close(each[0], one[0], rtol=0, atol=1e-4)
    assert not torch.allclose(each[1], one[1], atol=0.1)
    with pytest.raises(ValueError, match="1 prompts for 2 samples"):
        ldm.sample(c, net, 3, 2, 4, prompt=["left"])
    with pytest.raises(ValueError, match="never read 'car'"):
        ldm.sample(c, net, 3, 2, 4, prompt="light car")


def test_guidance_leads_from_the_negative_words_to_the_prompt():
    """x0' of one step is that of out = without + w (with - without), for known outputs."""
    c = settings(predict="v", guidance=2.5, captions=True, vocabulary=("a", "b"), longest=2, f=2,
                 channels=1, shape=(1, 4, 4), negative="b")

    class Net(nn.Module):
        autoencoder = None

        def forward(self, z, time, label=None, tokens=None):
            return tokens.float().sum(1).view(-1, 1, 1, 1).expand_as(z) / 10

    tokens, negative = ldm.read(c, "a", 3), ldm.read(c, "b a", 3)
    assert tokens.tolist() == [[1, 0]] * 3 and negative.tolist() == [[2, 1]] * 3
    z = torch.randn(3, 1, 2, 2)
    row = torch.tensor([0.6, -0.8, 0.0, 1.0, 0.0])
    got, _ = ldm.denoise(c, Net(), z, torch.tensor([5]), row, torch.tensor(0), torch.arange(3),
                         None, tokens, negative)
    out = 0.3 + 2.5 * (0.1 - 0.3)
    assert_close(got, 0.6 * z - 0.8 * out)


def test_a_resumed_run_reads_the_same_words(place):
    """Bit for bit; the reader of words is among the weights."""
    given = ["--train", "--data", "halves", *SMALL["ldm"][:-6], "--captions", "--autoencoder",
             "said"]
    run(place, "ldm", *given, "--iters", 40, "--run", "once")
    run(place, "ldm", *given, "--iters", 20, "--run", "twice")
    run(place, "ldm", *given, "--iters", 40, "--run", "twice")
    one, two = weights(place / "once"), weights(place / "twice")
    assert all(same(one[part], two[part]) for part in ("net", "ema", "optimizer"))
    assert one["net"]["text.word.weight"].shape == (6, unet.CONTEXT)
    begun = unet.TextEncoder(5, 4).state_dict()["layers.layers.0.linear1.weight"]
    assert one["net"]["text.layers.layers.0.linear1.weight"].shape == begun.shape
    assert losses(place / "once").tolist() == losses(place / "twice").tolist()


def test_fine_tuning_keeps_the_words_that_it_knows(place):
    files = halves()
    for i in range(160):
        files[f"{i:03}.txt"] = f"a very light half at the {SIDES[i % 2]}".encode()
    folder(place / "others", files)
    done = run(place, "ldm", "--train", "--data", "others", "--iters", 1, "--lr", "1e-9", "--init",
               "said/checkpoint.pt", "--run", "tuned", "--batch", 16)
    assert "words that start anew: a, half, very" in done.stderr
    old, new = (weights(place / name) for name in ("said", "tuned"))
    known = old["data"]["vocabulary"]
    for i, word in enumerate(new["data"]["vocabulary"]):
        if word in known:
            assert_close(new["net"]["text.word.weight"][1 + i],
                         old["ema"]["net"]["text.word.weight"][1 + known.index(word)])
    assert_close(new["net"]["text.word.weight"][0], old["ema"]["net"]["text.word.weight"][0])
    assert_close(new["net"]["text.place"][:4], old["ema"]["net"]["text.place"])
    assert len(new["net"]["text.place"]) == 7


def test_a_folder_s_captions_get_maps_that_attend_and_no_mirrored_pictures(place):
    """With and without a GPU's recipe; who gives a flag has it."""
    given = dict(data=str(place / "halves"), captions=True)
    for row in (dict(device="cpu"), dict(device="cpu", width=48)):
        c = flags.settings("ldm", ldm.FLAGS, ldm.RECIPES, **given, **row)
        assert c.attention == (8,) and not c.flip and c.captions
    c = flags.settings("ldm", ldm.FLAGS, ldm.RECIPES, **given, device="cpu", flip=True)
    assert c.flip
    plain = flags.settings("ldm", ldm.FLAGS, ldm.RECIPES, data=given["data"], device="cpu")
    assert plain.attention == () and plain.flip and not plain.captions
    c.shape, c.labels, c.vocabulary, c.longest = (3, 64, 64), 0, ("a",), 1
    assert c.f == 2
    with pytest.raises(ValueError, match="sides of 32,16: give --attention 16, or --no-captions"):
        ldm.network(c)


def test_words_are_evaluated_by_what_they_ask_for(place, monkeypatch):
    monkeypatch.setitem(metrics.UPDATES, 3, 5)
    run(place, "ldm", "--train", "--evaluate", "--data", "words", *SMALL["ldm"], "--iters", 3,
        "--n", 40, "--steps", 2)
    found = json.loads((place / "runs" / "ldm-words" / "evaluation.json").read_text())
    for name in words.ATTRIBUTES:
        assert 0 <= found[f"asked_{name}"] <= 1 and 0 <= found[f"real_{name}"] <= 1
    assert found["real_ground"] == 1 and found["asked_place"] < 0.5


def test_a_vocabulary_that_is_none_is_damage(place):
    saved = torch.load(place / "said" / "checkpoint.pt", weights_only=True)
    for vocabulary, longest in (([1, 2], 4), (5, 4), (["a"], -1), (["a"], "x")):
        saved["data"] |= dict(vocabulary=vocabulary, longest=longest)
        torch.save(saved, place / "bad.pt")
        done = run(place, "ldm", "--sample", "--checkpoint", "bad.pt", code=2)
        assert "is damaged" in done.stderr and "Traceback" not in done.stderr


def test_evaluation_asks_for_what_held_out_pictures_show(place, monkeypatch):
    """Which are these captions; of a folder nothing but the usual is then measured."""
    asked = []
    sample = ldm.sample

    def heard(c, net, first, n, steps=None, label=None, frames=None, z=None, prompt=""):
        asked.extend(prompt)
        return sample(c, net, first, n, steps, label, frames, z, prompt)
    monkeypatch.setattr(ldm, "sample", heard)
    monkeypatch.setitem(metrics.UPDATES, 3, 5)
    run(place, "ldm", "--evaluate", "--run", "said", "--n", 20, "--steps", 2)
    assert len(asked) == 20
    test = data.load(str(place / "halves"), place / "data", 8, split="test")
    assert sorted({*asked}) == sorted({test.caption(i) for i in range(len(test))})
    found = json.loads((place / "said" / "evaluation.json").read_text())
    assert "fcd" in found and found["guidance"] == 2  # by row "captions", without --data


# ------------------------------------------------------------------------------------------- edits
@pytest.mark.parametrize("more", [[], ["--strength", "0.35"],
                                  ["--prompt", "left", "--prompt", "right"],
                                  ["--guidance", "2", "--prompt", "left", "--eta", "1"]])
def test_what_is_black_in_the_mask_comes_back_to_the_byte(place, more):
    mask = np.array(Image.open(place / "mask.png")) > 127
    known = np.array(Image.open(place / "image.png"))
    x = drawn(place, "--image", "image.png", "--mask", "mask.png", "--n", 4, "--steps", 3, *more)
    assert len(x) == 4 * (2 if "right" in more else 1)
    assert (x[:, ~mask] == known[~mask]).all()
    assert (x[:, mask] != known[mask]).mean() > 0.5
    assert (x[0] != x[1]).any()  # each of other noise
    shutil.rmtree(place / "edits", ignore_errors=True)
    run(place, "ldm", "--sample", "--run", "said", "--image", "image.png", "--mask", "mask.png",
        "--n", 1, "--steps", 3, "--out", "edits")
    assert (np.array(Image.open(place / "edits" / "00000.png"))[~mask] == known[~mask]).all()


def test_the_part_that_is_painted_agrees_with_the_rest(place):
    """Where one half of a picture is known, the model knows what the other one must be."""
    left = np.full((8, 8, 3), 225, np.uint8)
    left[:, 4:] = 120
    Image.fromarray(left).save(place / "light.png")
    Image.fromarray(255 - left).save(place / "dark.png")  # whose left is 30
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(place / "half.png")
    given = ["--mask", "half.png", "--n", 16, "--steps", 20]
    assert drawn(place, "--image", "light.png", *given)[:, :, 4:].mean() < 90
    assert drawn(place, "--image", "dark.png", *given)[:, :, 4:].mean() > 165


def test_strength_decides_how_much_of_a_picture_stays(place):
    c, net = ldm.load(place / "said" / "checkpoint.pt", device="cpu", precision="fp32")
    x = data.load(str(place / "halves"), place / "data", 8).batch(torch.tensor([0]))[0]
    again = ldm.reconstructed(c, net.autoencoder, x)
    off = []
    for c.strength in (0.05, 0.3, 0.6, 1.0):
        off.append((ldm.edit(c, net, x, None, 0, 64, 4) - again).square().mean().item())
    assert off[0] < 0.05 < 0.3 < off[3] and off == sorted(off), off


@pytest.mark.parametrize("strength, begins", [(0.005, 1), (0.07, 7), (0.071, 8), (0.29, 29),
                                              (0.5, 50), (1.0, 100)])
def test_an_edit_has_exactly_k_evaluations_from_its_strength_down(place, strength, begins):
    """For every K that fits; z begins as the picture's latents, noised to that step."""
    c, net = ldm.load(place / "said" / "checkpoint.pt", device="cpu", precision="fp32")
    c.strength, visited, seen = strength, [], []
    assert ldm.begins_at(c, False) == begins

    def counted(c, net, z, t, row, *rest):
        visited.append(int(t))
        seen.append(z)
        return z, z
    patched = pytest.MonkeyPatch()
    patched.setattr(ldm, "denoise", counted)
    known = torch.randn(1, 3, 4, 4)
    for steps in {1, 2, 3, 7, begins // 2, begins - 1, begins} - {0}:
        for kept in (None, torch.ones(1, 1, 4, 4, dtype=torch.bool)):
            if steps <= begins:
                visited.clear()
                ldm.latents(c, net, 2, 2, steps, known=known, kept=kept)
                assert len(visited) == steps and visited[0] == begins and visited[-1] >= 1
                assert visited == sorted({*visited}, reverse=True)
    with pytest.raises(ValueError, match="steps"):
        ldm.latents(c, net, 2, 2, begins + 1, known=known)
    patched.undo()
    ab = alpha_bar(c.schedule, c.T)[begins]
    eps = randn((2, 3, 4, 4), c.seed, 2, stream=START)
    assert_close(seen[0], (ab.sqrt() * known + (1 - ab).sqrt() * eps).float())


def test_latents_of_which_no_pixel_is_painted_are_the_picture_s_own(place):
    c, net = ldm.load(place / "said" / "checkpoint.pt", device="cpu", precision="fp32")
    known, kept = torch.randn(1, 3, 4, 4), torch.rand(1, 1, 4, 4) < 0.5
    z = ldm.latents(c, net, 0, 5, 6, known=known, kept=kept)
    there = kept.expand_as(z)
    assert torch.equal(z[there], known.expand_as(z)[there])
    assert (z[~there] != known.expand_as(z)[~there]).all()
    # one painted pixel is enough for a latent to be drawn anew, and its neighbours stay
    found = []
    patched = pytest.MonkeyPatch()
    patched.setattr(ldm, "latents", lambda *given: found.append(given[-1]) or known)
    painted = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    painted[0, 0, 3, 6] = True
    ldm.edit(c, net, torch.zeros(1, 3, 8, 8), painted, 0, 1)
    patched.undo()
    assert (~found[0]).nonzero().tolist() == [[0, 0, 1, 3]]


def test_a_trajectory_shows_what_is_not_painted_as_it_is(place):
    c, net = ldm.load(place / "said" / "checkpoint.pt", device="cpu", precision="fp32")
    x, painted = data.read_edit(place / "image.png", place / "mask.png", c.shape)
    frames = []
    y = ldm.edit(c, net, x, painted, 0, 3, 5, frames=frames)
    assert len(frames) == 5
    known = (~painted).expand_as(y)
    for frame in (*frames, y):
        assert torch.equal(frame[known], x.expand_as(y)[known])
    assert not torch.equal(frames[0], frames[-1])
    run(place, "ldm", "--sample", "--run", "said", "--image", "image.png", "--mask", "mask.png",
        "--n", 2, "--steps", 3, "--out", "edit.gif")
    assert (place / "edit.gif").exists()


def test_how_many_steps_an_edit_has_is_the_model_s_to_say():
    """Not the recipe's T of 1000."""
    given = dict(image="a.png", strength=0.05, steps=100)
    ldm.check_model(settings(T=4000, **given))
    with pytest.raises(ValueError, match="leaves 50 of T = 1000"):
        ldm.check_model(settings(T=1000, **given))
    with pytest.raises(ValueError, match="its strength leaves 1000 of T = 1000"):
        ldm.check_model(settings(T=1000, image="a.png", mask="m.png", steps=1001))
    with pytest.raises(ValueError, match="its strength leaves 600 of T = 1000"):
        ldm.check_model(settings(T=1000, image="a.png", steps=1000))


def test_another_size_and_mode_is_taken_as_data_are_and_said(place):
    done = run(place, "ldm", "--sample", "--run", "said", "--image", "large.png", "--n", 2,
               "--steps", 2)
    assert "large.png, 20 x 30 L: its middle square is made 8 x 8 RGB" in done.stderr
    assert "2 samples" in done.stdout and "said/edit.png" in done.stdout
    done = run(place, "ldm", "--sample", "--run", "said", "--image", "image.png", "--n", 2,
               "--steps", 2)
    assert "is made" not in done.stderr


@pytest.mark.parametrize("given, says", [
    ("--image image.png --mask large.png", "--mask large.png is 20 x 30, and --image image.png is "
     "8 x 8"),
    ("--image image.png --mask black.png", "has no white"),
    ("--image none.png", "none.png is not there"),
    ("--image halves/000.txt", "is not a picture"),
    ("--image image.png --mask halves/000.txt", "is not a picture"),
    ("--mask mask.png", "--mask does nothing without --image"),
    ("--strength 0.5", "--strength does nothing without --image"),
    ("--image image.png --strength 0", "--strength"),
    ("--image image.png --strength 1.01", "--strength"),
    ("--image image.png --strength 0.1 --steps 11", "leaves 10 of T = 100 steps"),
    ("--image image.png --walk 3 --strength 0.5", "--strength does nothing with --walk"),
    ("--image image.png --walk 3 --steps 3", "--steps does nothing where --walk begins at"),
    ("--image image.png --walk 3 --prompt left", "--prompt does nothing where --walk begins at"),
    ("--walk 3 --n 257", "257 samples: a .gif shows at most 256"),
    ("--walk 3 --n 2 --walk-step 1e308", "leaves what numbers can hold"),
    ("--image large.png --mask black.png", "is 8 x 8, and --image large.png is 20 x 30"),
    ("--image image.png --strength 1e-10 --steps 2", "leaves 1 of T = 100"),
    ("--guidance 2", "--guidance does nothing without --prompt"),
    ("--walk 3 --out walk.png", "--walk writes a .gif"),
    ("--walk 0", "--walk"),
    ("--walk-step 0.1", "--walk-step does nothing with --walk 0"),
    ("--image image.png --interpolate", "does nothing with --interpolate"),
    ("--prompt", "--prompt"),
    ("--prompt , --n 2", "--prompt ',' has no words"),
    ("--prompt ; --n 2", "--prompt ' ' has no words"),
    ("--prompt light at", "unrecognized arguments: at"),
    ("--prompt house", "never read 'house'"),
    ("--prompt light --negative house --guidance 2", "--negative 'house': this model"),
    ("--prompt light --negative left --guidance 1", "--negative does nothing with --guidance 1"),
    ("--prompt the the the the the", "5 words, and this model reads 4"),
])
def test_wrong_edits_and_prompts_end_with_one_line_and_nothing_written(place, given, says):
    before = {p: p.stat().st_mtime for p in (place / "said").rglob("*")}
    given = given.replace("--prompt the the the the the", "--prompt the;the;the;the;the")
    done = run(place, "ldm", "--sample", "--run", "said",
               *[part.replace(";", " ") for part in given.split()], code=2)
    assert says in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime for p in (place / "said").rglob("*")} == before


# -------------------------------------------------------------------------------------------- walk
class Itself(nn.Module):
    """An autoencoder whose latents are pictures."""

    def decode(self, z):
        return z

    def unscaled(self, z):
        return z


def test_the_walk_s_variance_is_2_eta_t():
    c = settings(walk=100, walk_step=0.01, shape=(1, 8, 8), seed=3)
    net = ldm.LatentDiffusion(Itself(), None)
    begin = torch.randn(2500, 1, 8, 8)
    off = [x - begin for x in ldm.wander(c, net, begin)]
    assert len(off) == 101 and not off[0].any()
    for t in (1, 10, 50, 100):
        assert_close(off[t].var().item(), 0.02 * t, rtol=0.02, atol=0)
        assert abs(off[t].mean().item()) < 0.02
    step = off[51] - off[50]  # each step is fresh noise, and the same for whoever asks again
    assert abs((step * off[50]).mean().item()) < 0.01
    again = list(ldm.wander(c, net, begin[:3]))
    assert_close(again[100] - begin[:3], off[100][:3])


def test_a_walk_is_a_gif_that_begins_at_the_picture_or_a_sample(place):
    done = run(place, "ldm", "--walk", 6, "--run", "said", "--image", "image.png", "--n", 2)
    assert "2 walks of 6 steps" in done.stdout
    with Image.open(place / "said" / "walk.gif") as gif:
        assert gif.n_frames >= 6
        first = np.array(gif.convert("RGB"))
    c, net = ldm.load(place / "said" / "checkpoint.pt", device="cpu")
    x = data.read_pictures([place / "image.png"], c.shape)
    again = pictures.to_uint8(ldm.reconstructed(c, net.autoencoder, x)).expand(2, -1, -1, -1)
    expected = np.array(pictures.grid(again)).astype(int)
    assert first.shape == expected.shape and abs(first - expected).mean() < 12  # 256 colours
    run(place, "ldm", "--walk", 3, "--run", "said", "--prompt", "light at the right", "--n", 1,
        "--steps", 10, "--out", "right.gif", "--walk-step", "1e-6")
    with Image.open(place / "right.gif") as gif:
        x = np.array(gif.convert("RGB"))  # a picture of 48 x 48, and 6 around it
    assert x.shape == (60, 60, 3)
    assert x[6:54, 32:54].mean() > 50 + x[6:54, 6:28].mean()


# ------------------------------------------------------------------------------------- consistency
def linear(c, a, b):
    """The autoencoder e(x) = a x, D(z) = b z."""
    class Encoder(nn.Module):
        def forward(self, x):
            return torch.cat([a * x, torch.full_like(x, -30.0)], 1)  # of almost no variance

    class Decoder(nn.Module):
        def forward(self, z):
            return b * z
    ae = autoencoder.build(c)
    ae.encoder, ae.decoder = Encoder(), Decoder()
    return ae


def test_the_two_sided_consistency_of_a_linear_autoencoder():
    """(1 - a b)^2 (a^2 + alpha) c^2, of which ours is 1 / alpha: a 2, b .4, alpha .5, c 1: .18."""
    alpha = 0.5
    c = settings(consistency=1 / alpha, kl=0.0, channels=1, shape=(1, 8, 8))
    x = torch.randn(6, 1, 8, 8)
    x = x / x.square().mean().sqrt()
    a = torch.tensor(2.0, requires_grad=True)
    b = torch.tensor(0.4, requires_grad=True)
    loss, parts = ldm.autoencoder_loss(c, linear(c, a, b), x, torch.zeros_like(x))
    assert_close(alpha * loss.item(), 0.18, rtol=1e-5, atol=0)
    assert_close(parts["consistency"].item(), 0.16, rtol=1e-5, atol=0)
    (alpha * loss).backward()  # through both, and nothing is held still
    assert_close(a.grad.item(), -2 * 0.2 * 0.4 * 4.5 + 0.04 * 2 * 2, rtol=1e-4, atol=0)
    assert_close(b.grad.item(), -2 * 0.2 * 2 * 4.5, rtol=1e-4, atol=0)
    without = settings(kl=0.0, channels=1, shape=(1, 8, 8))
    loss, parts = ldm.autoencoder_loss(without, linear(c, a, b), x, torch.zeros_like(x))
    assert_close(loss.item(), 0.04, rtol=1e-5, atol=0)
    assert "consistency" not in parts


@pytest.mark.parametrize("latent", ["kl", "vq"])
def test_consistency_is_trained_and_told(place, latent):
    """Its weight times what is logged of it is in the loss, and the weights are others by it."""
    given = ["--train", *GIVEN[:-1], "--latent", latent, "--iters", 20]
    rows = {}
    for weight in ("0", "3"):
        name = f"{latent}-{weight}"
        run(place, "ldm", *given, "--consistency", weight, "--run", name)
        rows[weight] = np.genfromtxt(place / name / "autoencoder" / "metrics.csv", delimiter=",",
                                     names=True)
    assert "consistency" not in rows["0"].dtype.names and rows["3"]["consistency"].min() > 0
    if latent == "kl":
        parts = rows["3"]["mse"] + 1e-5 * rows["3"]["kl"] + 3 * rows["3"]["consistency"]
        assert_close(rows["3"]["loss"], parts, rtol=1e-4, atol=0)
    one, two = (weights(place / f"{latent}-{weight}")["net"] for weight in ("0", "3"))
    assert not torch.equal(one["autoencoder.mean"], two["autoencoder.mean"])
