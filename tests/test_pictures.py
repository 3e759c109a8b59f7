import numpy as np
import torch
from PIL import Image, ImageSequence

from common import pictures


def test_levels_round_to_the_nearest():
    levels = torch.arange(256)
    x = levels / 127.5 - 1
    assert torch.equal(pictures.to_uint8(x), levels.to(torch.uint8))
    # less than half a level
    assert torch.equal(pictures.to_uint8(x + 0.003), levels.to(torch.uint8))
    assert pictures.to_uint8(torch.tensor([-7., 7.])).tolist() == [0, 255]


def test_grid_places_each_picture():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 32, 32) * 40
    sheet = np.asarray(pictures.grid(images, columns=3))
    assert sheet.shape == (2 * 34 + 2, 3 * 34 + 2)
    assert [sheet[2 + 34 * (i // 3), 2 + 34 * (i % 3)] for i in range(6)] == [
        0, 40, 80, 120, 160, 200]
    assert pictures.grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).mode == "RGB"


def test_every_ending(tmp_path):
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    with np.load(pictures.save(tmp_path / "a.npz", x, torch.tensor([2, 0, 1]))) as arrays:
        assert ((arrays["arr_0"] == pictures.to_uint8(x).permute(0, 2, 3, 1).numpy()).all()
                and arrays["arr_1"].tolist() == [2, 0, 1])
    pictures.save(tmp_path / "one", x)
    assert (np.asarray(Image.open(tmp_path / "one" / "00002.png"))
            == pictures.to_uint8(x[2]).permute(1, 2, 0).numpy()).all()
    with Image.open(pictures.save(tmp_path / "a.gif", x, frames=[x * 0, x * 0.5, x])) as gif:
        assert gif.n_frames == 3
    assert Image.open(pictures.save(tmp_path / "a.png", x)).size[0] > 16
    points = torch.rand(50, 2)
    with np.load(pictures.save(tmp_path / "p.npz", points)) as arrays:
        assert (arrays["arr_0"].dtype == np.float32 and (arrays["arr_0"] == points.numpy()).all()
                and (arrays["arr_1"] == -1).all())
    assert len(np.unique(np.asarray(Image.open(pictures.save(tmp_path / "p.png", points))))) > 3
    with Image.open(pictures.save(tmp_path / "p.gif", points, frames=[points, points / 2])) as gif:
        assert gif.n_frames == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_curves_draw_every_column(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,seconds,loss,accuracy\n10,1.0,0.5,0.1\n20,2.0,0.25,0.9\n")
    pictures.curves(tmp_path)
    tall = Image.open(tmp_path / "loss.png").size[1]
    (tmp_path / "metrics.csv").write_text("step,seconds,loss\n10,1.0,0.5\n20,2.0,0.25\n")
    pictures.curves(tmp_path)
    one = Image.open(tmp_path / "loss.png").size[1]
    assert one < tall
    # a vector: one panel
    (tmp_path / "metrics.csv").write_text(
        "step,seconds,loss_1,loss_2\n10,1.0,0.5,0.1\n20,2.0,0.25,0.9\n")
    pictures.curves(tmp_path)
    assert Image.open(tmp_path / "loss.png").size[1] == one
    # the last row covers one update, in which what is computed every tenth time was not
    rows = "".join(f"{i},1,0.5\n" for i in range(10, 110, 10))
    (tmp_path / "metrics.csv").write_text("step,seconds,lazy\n" + rows)
    pictures.curves(tmp_path)
    flat = (tmp_path / "loss.png").read_bytes()
    (tmp_path / "metrics.csv").write_text("step,seconds,lazy\n" + rows + "101,1,0\n")
    pictures.curves(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == flat
    (tmp_path / "metrics.csv").write_text("step,seconds,lazy\n" + rows + "108,1,0\n")
    pictures.curves(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() != flat
    # more than a picture shows: means of four, so a flat line
    rows = "".join(f"{i},1,{i % 2},2,3\n" for i in range(1000))
    (tmp_path / "metrics.csv").write_text("step,seconds,loss,r1,spread\n" + rows)
    pictures.curves(tmp_path)
    many = Image.open(tmp_path / "loss.png").convert("RGB")
    assert many.size == (1200, 2 * one)
    blue = (np.asarray(many)[:one, :600] == (31, 119, 180)).all(-1)
    assert blue.any() and np.ptp(np.nonzero(blue)[0]) <= 2


def test_each_frame_of_a_colour_gif_has_colours_of_its_own(tmp_path):
    """The mean error is of a palette made for the frame; one for the web would have 15 of 255."""
    ramp = torch.linspace(-1, 1, 64)
    one = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), -ramp.expand(64, 64)])
    two = one.flip(0) * 0.4 + 0.6
    path = pictures.save(tmp_path / "a.gif", one[None], frames=[two[None], one[None]])
    with Image.open(path) as gif:
        shown = [np.asarray(frame.convert("RGB")).astype(float)
                 for frame in ImageSequence.Iterator(gif)]
    for frame, x in zip(shown, (two, one)):
        want = np.asarray(pictures.grid(pictures.to_uint8(x[None]))).astype(float)
        assert frame.shape == want.shape and abs(frame - want).mean() < 5
