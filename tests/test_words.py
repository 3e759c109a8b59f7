"""Captions: the set `words` and how its pictures are measured, folders, and texts as numbers."""
import io
import tarfile

import pytest
import torch
from torch.testing import assert_close

import conftest
import ldm
from common import data, draws, metrics, text, unet, words
from conftest import SMALL, run
from test_data import folder
from test_own_pictures import both, picture, zipped

TINY = [*SMALL["ldm"], "--iters", "10"]
SAID = {"a": "A cat on the mat.", "b": "the dog", "c": "a cat", "d": "The mat", "e": "dog on cat"}


@pytest.fixture(scope="module")
def drawn():
    """800 pictures of words, their digits, captions, and the width between thin and bold."""
    images, digits, captions = words.draw(32, 3, 800)
    images = torch.from_numpy(images)
    return images, torch.from_numpy(digits), captions, words.halfway(images[:400], captions[:400])


# ------------------------------------------------------------------------------------------- words
def test_what_is_measured_of_a_drawn_picture_is_what_its_caption_says(drawn):
    images, digits, captions, bold = drawn
    seen = dict(digit=digits) | words.measured(images, bold)
    right = words.shares(seen, captions)
    assert list(right) == list(words.ATTRIBUTES)
    assert all(share > 0.99 for share in right.values()), right
    # the captions of other pictures are as often right as chance has it
    wrong = words.shares(seen, captions[1:] + captions[:1])
    chance = dict(digit=0.1, colour=0.2, ground=0.34, size=0.5, weight=0.5, place=0.11)
    assert all(abs(wrong[name] - share) < 0.08 for name, share in chance.items()), wrong


def test_each_measure_looks_at_what_it_names():
    """A box of known ink on a known ground; each change is seen by the measures it belongs to."""
    def square(colour, ground, left, top, size, hole=0):
        image = torch.empty(3, 32, 32, dtype=torch.uint8)
        image[:] = torch.tensor(words.PALETTE[ground]).byte()[:, None, None]
        image[:, top:top + size, left:left + size] = \
            torch.tensor(words.PALETTE[colour]).byte()[:, None, None]
        inner = slice(hole, size - hole)
        if hole:
            image[:, top:top + size, left:left + size][:, inner, inner] = \
                torch.tensor(words.PALETTE[ground]).byte()[:, None, None]
        return image

    shown = torch.stack([square("red", "black", 2, 2, 8), square("blue", "grey", 7, 7, 18, 2),
                         square("white", "blue", 21, 12, 10, 1),
                         square("black", "red", 4, 12, 8)])
    seen = words.measured(shown, 0.3)
    names = words.ATTRIBUTES
    assert [names["place"][i] for i in seen["place"]] == ["top left", "centre", "right", "left"]
    assert seen["size"].tolist() == [0, 1, 0, 0]
    assert seen["weight"].tolist() == [1, 0, 0, 1]
    assert [names["colour"][i] for i in seen["colour"][:3]] == ["red", "blue", "white"]
    assert [names["ground"][i] for i in seen["ground"][:3]] == ["black", "grey", "blue"]
    # no caption says black on red: that is neither colour, rather than the nearest one
    assert seen["colour"][3] == seen["ground"][3] == -1
    blank = torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)
    blank[0, :, 8:24, 8:24] += 20  # which nobody would see
    seen = words.measured(blank, 0.3)
    assert words.ATTRIBUTES["ground"][seen.pop("ground")] == "black"
    assert seen == dict(colour=-1, size=-1, weight=-1, place=-1)


def test_what_a_prompt_asks_for():
    index = {name: values.index for name, values in words.ATTRIBUTES.items()}
    assert words.asked("a small thin green four on black at the top left") == dict(
        digit=4, colour=index["colour"]("green"), ground=index["ground"]("black"), size=0,
        weight=0, place=0)
    assert words.asked("A bold red seven on blue") == dict(
        digit=7, colour=index["colour"]("red"), ground=index["ground"]("blue"), weight=1)
    assert words.asked("a white one") == dict(digit=1, colour=index["colour"]("white"))
    assert words.asked("on grey") == dict(ground=index["ground"]("grey"))
    assert words.asked("in the centre") == dict(place=4)
    assert words.asked("a small large one at the right") == dict(digit=1, place=5)
    # only who asks is counted
    seen = dict(digit=torch.tensor([7, 7, 3]), colour=torch.zeros(3))
    assert words.shares(seen, ["a seven", "a two", "red"]) == dict(digit=0.5, colour=1.0)


def test_drawn_words_are_all_there_and_always_the_same(drawn):
    images, digits, captions, _ = drawn
    again, same_digits, same_captions = words.draw(32, 3, 800)
    assert torch.equal(torch.from_numpy(again), images) and captions == same_captions
    assert digits.tolist() == same_digits.tolist()
    other, _, _ = words.draw(32, 4, 800)
    assert not torch.equal(torch.from_numpy(other), images)
    asked = [words.asked(caption) for caption in captions]
    for name, values in words.ATTRIBUTES.items():
        assert {want[name] for want in asked} == set(range(len(values))), name
    colours = [(words.ATTRIBUTES["colour"][want["colour"]],
                words.ATTRIBUTES["ground"][want["ground"]]) for want in asked]
    assert all(colour != ground for colour, ground in colours) and len({*colours}) == 14
    assert [want["digit"] for want in asked] == digits.tolist()


def test_the_named_set_brings_its_captions(tmp_path):
    train = data.load("words", tmp_path, 16)
    assert train.shape == (3, 16, 16) and len(train) == 18_000 and len(train.classes) == 10
    assert len(train.vocabulary) == 31 and train.captions.shape[1] == 11
    assert "captions beside 18,000, of 31 different words" in train.told()
    for i in (0, 5000, 17_999):
        assert words.asked(train.caption(i))["digit"] == train.labels[i]
    few = data.load("words", tmp_path, 16, classes=["three", "four"], split="test")
    assert {"three", "four"} < {*few.vocabulary} and "two" not in few.vocabulary
    assert words.asked(few.caption(3))["digit"] in (3, 4)


def test_samples_are_judged_by_what_they_were_asked_for(tmp_path, monkeypatch):
    """Real pictures with their captions get what real pictures get; with others' they do not."""
    monkeypatch.setitem(metrics.UPDATES, 3, 40)
    c = conftest.settings(ldm, data="words", size=16, data_root=str(tmp_path), chosen=())
    test = data.load("words", tmp_path, 16, split="test")
    held_out = metrics.choice(len(test), 2000)
    captions = [test.caption(i) for i in held_out]
    x, _ = test.batch(held_out)
    found = metrics.as_asked(c, x, captions)
    for name in words.ATTRIBUTES:
        assert found[f"asked_{name}"] == found[f"real_{name}"]
        assert found[f"asked_{name}"] > (0.8 if name != "digit" else 0.05), name
    wrong = metrics.as_asked(c, x, captions[1:] + captions[:1])
    assert wrong["asked_ground"] < 0.4 and wrong["real_ground"] == found["real_ground"]
    told = metrics.report(found)
    assert "ground as asked for" in told and "real pictures' 100.0%" in told


# -------------------------------------------------------------------------------------------- texts
def test_texts_become_numbers_and_sentences_again():
    assert text.words_of("A Cat's hat, blue-green; \n 1girl (Ärger)!") == \
        ["a", "cat's", "hat", "blue-green", "1girl", "ärger"]
    known = text.vocabulary_of(["a red seven", "A blue one."])
    assert known == ["a", "blue", "one", "red", "seven"]
    tokens = text.numbers(["a red one", "", "Seven green a a a a"], known, 4)
    assert tokens.tolist() == [[1, 4, 3, 0], [0, 0, 0, 0], [5, 1, 1, 1]]
    assert [text.sentence(row, known) for row in tokens] == ["a red one", "", "seven a a a"]


def test_a_prompt_that_cannot_be_read():
    known = ["a", "on", "red", "seven"]
    text.readable(["A red seven, on red"], known, 5)
    with pytest.raises(ValueError, match="never read 'rad' .did you mean red?"):
        text.readable(["a red", "a rad seven"], known, 5)
    with pytest.raises(ValueError, match="knows a, on, red, seven$"):
        text.readable(["a car"], known, 5)
    with pytest.raises(ValueError, match="--negative '  !' has no words"):
        text.readable(["  !"], known, 5, "--negative")
    with pytest.raises(ValueError, match="6 words, and this model reads 5"):
        text.readable(["a a a a a a"], known, 5)
    many = [f"w{i}" for i in range(100)]
    with pytest.raises(ValueError, match="w59, and 40 more"):
        text.readable(["other"], many, 5)


def test_the_encoder_reads_each_text_by_itself_and_in_its_order():
    torch.manual_seed(0)
    net = unet.TextEncoder(6, 4).eval()
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 0, 0], [0, 0, 0, 0]])
    context = net(tokens)
    assert context.shape == (4, 4, 64)
    for row in range(4):
        assert_close(net(tokens[row:row + 1]), context[row:row + 1])
    # the same word at another place, or among other words, is another vector
    assert (context[0] - context[1].flip(0)).abs().amax() > 0.1
    assert (context[0, 0] - context[2, 0]).abs().amax() > 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(net(tokens), context)


def test_dropped_words_are_a_function_of_the_update(monkeypatch):
    c = conftest.settings(ldm, batch=4000, seed=5)
    tokens = torch.arange(1, 9).repeat(4000, 1)
    kept = draws.drop_words(tokens, c, 7, 0.1, 0.6)
    assert torch.equal(kept, draws.drop_words(tokens, c, 7, 0.1, 0.6))
    assert not torch.equal(kept, draws.drop_words(tokens, c, 8, 0.1, 0.6))
    many = (kept > 0).sum(1)
    # what is left stands in its order, at the front
    for row, n in zip(kept[:200], many):
        assert (row[:n].diff() > 0).all() and (row[n:] == 0).all()
    left = kept.flatten().bincount(minlength=9)[1:] / 4000
    assert_close(left, torch.full((8,), 0.9 * 0.7), rtol=0, atol=0.03)
    # the rate is a caption's own: .1 say nothing by lot, and of the others
    # E[(1 - r)^8] = (1 - .4^9) / (9 * .6) say all
    assert abs((many == 8).double().mean() - 0.9 * 0.185) < 0.02
    assert abs((many == 0).double().mean() - 0.1) < 0.02
    # two processes drop what one would
    monkeypatch.setattr(draws, "world", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
        halves.append(draws.drop_words(tokens[draws.part(4000)], c, 7, 0.1, 0.6))
    assert torch.equal(torch.cat(halves), kept)


# -------------------------------------------------------------------------------- beside pictures
def captioned(said=SAID, more=()):
    """Pictures and the captions beside them, as files of a folder."""
    files = {f"{name}.png": picture(40 * i) for i, name in enumerate(said)}
    return files | {f"{name}.txt": line.encode() for name, line in said.items()} | dict(more)


def captions_of(source, root):
    """{caption: grey level} of all pictures in it."""
    found = {}
    for part in both(source, root):
        for i in range(len(part)):
            found[int(part.images[i, 0, 0, 0])] = part.caption(i)
    return found


def test_captions_beside_the_files_of_a_folder_a_zip_and_a_tar(tmp_path):
    contents = captioned()
    stands = folder(tmp_path / "folder", contents)
    packed = zipped(tmp_path / "packed.zip", dict(reversed(contents.items())))
    with tarfile.open(tmp_path / "packed.tar", "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    train = data.load(str(stands), tmp_path / "root")
    known = {40 * i: " ".join(text.words_of(line)) for i, line in enumerate(SAID.values())}
    # what is held out may have words that training has not: these are not read
    held_out = data.load(str(stands), tmp_path / "root", split="test")
    assert len(train) == 4 and len(held_out) == 1
    for part in (train, held_out):
        for i in range(len(part)):
            whole = known[int(part.images[i, 0, 0, 0])].split()
            assert part.caption(i).split() == [w for w in whole if w in train.vocabulary]
    assert train.vocabulary == held_out.vocabulary == sorted(
        {word for i in range(4) for word in known[int(train.images[i, 0, 0, 0])].split()})
    assert ".txt" not in train.told() and "captions beside 4" in train.told()
    expected = captions_of(stands, tmp_path / "root")
    for path in (packed, tmp_path / "packed.tar"):
        assert captions_of(path, tmp_path / "root") == expected
        assert data.load(str(path), tmp_path / "root").content() == train.content()


def test_what_people_write_into_captions(tmp_path):
    """The first line with words, in UTF-8 or UTF-16; nothing where there is none; what is alone."""
    more = {"f.png": picture(210), "g.png": picture(220), "g.txt": b" \n", "h.png": picture(230),
            "h.txt": "\n\nEin Käse\nsecond".encode("utf-16"), "alone.txt": b"x",
            "sub/i.png": picture(240), "sub/i.TXT": b"\xef\xbb\xbfbom a " + b"w " * 80}
    stands = folder(tmp_path / "folder", captioned(more=more))
    found = captions_of(stands, tmp_path / "root")
    train = data.load(str(stands), tmp_path / "root")
    assert found[210] == found[220] == ""
    assert found[230] == " ".join(w for w in ("ein", "käse") if w in train.vocabulary)
    assert found[240].split()[:2] == ["bom", "a"] and len(found[240].split()) == text.LONGEST
    told = train.told()
    assert "1 .txt without a picture of that name" in told
    assert "1 captions' further lines" in told
    assert "1 captions' words after the first 64" in told
    # other captions are other data, and another cache
    (stands / "b.txt").write_text("a horse")
    assert "horse" in data.load(str(stands), tmp_path / "root").vocabulary
    (tmp_path / "plain").mkdir()
    plain = folder(tmp_path / "plain", {name: content for name, content in captioned().items()
                                        if name.endswith(".png")})
    without = data.load(str(plain), tmp_path / "root")
    assert without.captions is None and without.vocabulary == [] and "caption" not in without.told()


def test_captions_stay_with_their_pictures(tmp_path):
    """Among classes, splits, and files that cannot be read; also when they are named anew."""
    contents = {}
    for i in range(12):
        place = f"{('train', 'test')[i % 3 == 0]}/{('cat', 'dog')[i % 2]}/{97 * i % 12:02}"
        contents |= {f"{place}.png": picture(20 * i), f"{place}.txt": f"number n{i}".encode()}
        contents |= {f"{place}x.png": b"damaged", f"{place}x.txt": b"of what is damaged"}
    for i in range(3):  # beside train and test: left out, with what is said of it
        contents |= {f"extra/{i}.png": picture(250), f"extra/{i}.txt": b"what nobody reads"}
    stands = folder(tmp_path / "folder", contents)
    train, test = both(stands, tmp_path / "root")
    assert len(train) == 8 and len(test) == 4
    for i in range(8):
        number = int(train.images[i, 0, 0, 0]) // 20
        assert train.caption(i) == f"number n{number}" and train.classes[train.labels[i]] == \
            ("cat", "dog")[number % 2]
    assert all(test.caption(i) == "number" for i in range(4))  # n0, n3, ... are not learnt
    cats = data.load(str(stands), tmp_path / "root", classes=["cat"])
    assert all(cats.caption(i) == f"number n{int(cats.images[i, 0, 0, 0]) // 20}" for i in range(4))
    # a run of cats does not mind what is said of dogs, and none what files are called
    known = cats.content()
    path = next(path for path in stands.rglob("*.txt") if path.read_text() == "number n1")
    path.write_text("something else")
    assert data.load(str(stands), tmp_path / "root", classes=["cat"]).content() == known
    for path in sorted((stands / "train" / "cat").iterdir()):
        path.rename(path.with_name("z" + path.name))
    assert data.load(str(stands), tmp_path / "root", classes=["cat"]).content() == known
    assert data.load(str(stands), tmp_path / "root").content() != train.content()


def test_a_run_with_captions_knows_them_again(tmp_path):
    """Its captions may not change; those of a run that learns none may come and go."""
    stands = folder(tmp_path / "folder", captioned())
    given = ["--train", "--data", "folder", *TINY, "--size", 8]
    first = run(tmp_path, "ldm", *given, "--run", "plain")
    assert "has captions: --captions learns them" in first.stderr
    run(tmp_path, "ldm", *given, "--captions", "--run", "said")
    (stands / "c.txt").write_text("a horse")
    run(tmp_path, "ldm", *given[:-2], "--size", 8, "--iters", 12, "--run", "plain")
    assert "was trained with other captions" in run(
        tmp_path, "ldm", *given, "--captions", "--iters", 12, "--run", "said", code=2).stderr
    # but its samples need not the data
    run(tmp_path, "ldm", "--sample", "--run", "said", "--prompt", "dog", "--n", 2, "--steps", 2)
    for path in stands.glob("*.txt"):
        path.unlink()
    assert "--captions needs data with captions" in run(
        tmp_path, "ldm", *given, "--captions", "--run", "none", code=2).stderr
    assert not (tmp_path / "none").exists()
