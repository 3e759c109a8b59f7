"""The data set `words`: digits in colour, each with a caption, and what a picture shows of it.

    images, labels, captions = draw(32, seed)  # "a small thin green four on black at the top left"
    asked("a red seven on blue")               # {"digit": 7, "colour": 0, "ground": 1}
    measured(images, bold)                     # {"colour": (N,), "ground": (N,), "size": ...}

All of a caption is drawn, and all but the digit, for which there is a classifier, is measured: so
whether a model does what it is told needs no eye. It knows no network and no run.
"""
import torch

PALETTE = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), yellow=(255, 255, 0),
               white=(255, 255, 255), black=(0, 0, 0), grey=(128, 128, 128))
ATTRIBUTES = dict(
    digit="zero one two three four five six seven eight nine".split(),
    colour=["red", "green", "blue", "yellow", "white"],
    ground=["black", "blue", "grey"],  # never the digit's own colour
    size=["small", "large"],
    weight=["thin", "bold"],
    place=["top left", "top", "top right", "left", "centre", "right",
           "bottom left", "bottom", "bottom right"])  # row by row

PLACE = ("top", "bottom", "left", "right", "centre")  # the words of a place
HEIGHTS = dict(small=(0.36, 0.42), large=(0.52, 0.58))  # of the side
STROKE = dict(thin=0.0, bold=0.05)  # put around the font's own, of a letter's height
MARGIN = 0.02  # of the side, between a digit's centre and the next third
ABOUT = 0.03  # of the side: how far a digit's centre may be from the middle of its place
FAINT = 60  # levels, of the 200 and more between a ground and a colour: less is no ink
BETWEEN = 0.47  # of the side: what is higher is large


def caption(values):
    """The sentence of a number for each of ATTRIBUTES, in their order."""
    digit, colour, ground, size, weight, place = (
        names[value] for names, value in zip(ATTRIBUTES.values(), values))
    where = "in the centre" if place == "centre" else f"at the {place}"
    return f"a {size} {weight} {colour} {digit} on {ground} {where}"


def asked(text):
    """Which attributes a prompt asks for: {name: number among ATTRIBUTES[name]}.

    A colour after "on" is the ground's. Two words for one attribute, "small large", ask for none.
    """
    before, _, after = f" {text.lower()} ".partition(" on ")
    spoken = dict(colour=before, ground=after)
    found = {}
    for name, values in ATTRIBUTES.items():
        words = spoken.get(name, text.lower()).split()
        if name == "place":
            words = [" ".join(word for word in words if word in PLACE)]
        there = {values.index(word) for word in words if word in values}
        if len(there) == 1:
            found[name] = there.pop()
    return found


# ----------------------------------------------------------------------------------------- measured
def measured(images, bold):
    """What uint8 pictures (N, 3, H, W) show: {name: (N,) int64}, of all ATTRIBUTES but the digit.

    ground: the colour of PALETTE that is nearest to the median of the border; colour: to the median
    of what is farthest from the ground. -1 where that is none of the attribute's, and of all but
    the ground where there is no ink. size, place: of the box around the ink, which is what is
    nearer to the digit's colour than to the ground's.
    weight: bold where the stroke is wider than `bold`, see halfway().
    """
    x, ground, share = _ink(images)
    full = torch.where((share > 0.75)[:, None], x, torch.nan).flatten(2)
    top, bottom, left, right = _box(share)
    row = ((top + bottom) / 2 / x.shape[2] * 3).long()  # which third
    column = ((left + right) / 2 / x.shape[3] * 3).long()
    empty = share.amax((1, 2)) == 0
    return dict(colour=_nearest(full.nanmedian(2).values, "colour").masked_fill(empty, -1),
                ground=_nearest(ground, "ground"),
                size=((bottom - top) / x.shape[2] > BETWEEN).long().masked_fill(empty, -1),
                weight=(stroke(images) > bold).long().masked_fill(empty, -1),
                place=(3 * row + column).masked_fill(empty, -1))


def stroke(images):
    """The width of the ink's strokes, as a part of its height: float64 (N,).

    It is twice the area over the length of the rim, which is the sum of what neighbours differ by.
    """
    _, _, share = _ink(images)
    top, bottom, _, _ = _box(share)
    down, across = share.diff(dim=1)[:, :, 1:], share.diff(dim=2)[:, 1:]
    rim = (down.square() + across.square()).sqrt().sum((1, 2))
    return 2 * share.sum((1, 2)) / rim.clamp(min=1e-9) / (bottom - top)


def halfway(images, captions):
    """The width of stroke between thin and bold: halfway between the means of these pictures."""
    weight = torch.tensor([asked(text)["weight"] for text in captions])
    width = stroke(images)
    return float(width[weight == 0].mean() + width[weight == 1].mean()) / 2


def shares(seen, captions):
    """The share of pictures that show what is asked for: {name: share}, of what any asks for.

    seen: of each attribute what n pictures show, numbers (n,); captions: n texts.
    """
    wanted = [asked(text) for text in captions]
    result = {}
    for name in seen:
        right = [want[name] == number for want, number in zip(wanted, seen[name].tolist())
                 if name in want]
        if right:
            result[name] = sum(right) / len(right)
    return result


def _ink(images):
    """Pictures in float64, their grounds' colours (N, 3), and the share of ink in each pixel.

    There is none where no pixel is farther than FAINT from the ground.
    """
    x = images.double()
    inner = torch.zeros(x.shape[2:], dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    ground = x[:, :, ~inner].median(2).values
    distance = (x - ground[:, :, None, None]).square().sum(1).sqrt()
    most = distance.amax((1, 2), keepdim=True)
    return x, ground, torch.where(most < FAINT, 0.0, distance / most)


def _box(share):
    """top, bottom, left, right (N,) of the pixels that are mostly ink; bottom, right: one past."""
    ink = share > 0.5
    return *_ends(ink.any(2)), *_ends(ink.any(1))


def _ends(there):
    """The first and one past the last True of each row of there (N, n); 0 and n where none is."""
    there = there.int()
    return there.argmax(1), there.shape[1] - there.flip(1).argmax(1)


def _nearest(colours, attribute):
    """The numbers, in ATTRIBUTES, of the colours of PALETTE that are nearest to (N, 3)."""
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float64)
    names = ATTRIBUTES[attribute]
    number = torch.tensor([names.index(name) if name in names else -1 for name in PALETTE])
    return number[torch.cdist(colours, palette).argmin(1)]


# -------------------------------------------------------------------------------------------- drawn
def draw(size, seed, count=20_000):
    """Digits in colour, uint8 (count, 3, size, size), their labels (count,) and captions.

    Each is drawn k high, put through one affine map, and averaged down: its share of a pixel is
    then the digit's share of the pixel's colour.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    k = size * max(1, min(4, 128 // size))
    rng = np.random.default_rng([seed, size, len("words")])
    font = ImageFont.load_default(size=k)
    glyphs = []  # of each digit thin, then bold
    for digit in "0123456789":
        for width in STROKE.values():
            glyph = Image.new("L", (2 * k, 2 * k))
            ImageDraw.Draw(glyph).text((k, k), digit, 255, font=font, anchor="mm",
                                       stroke_width=width * k)
            glyphs.append(glyph.crop(glyph.getbbox()))

    # what each picture shows, (count,), in the order of ATTRIBUTES
    values = {name: rng.integers(len(names), size=count) for name, names in ATTRIBUTES.items()}
    values["digit"] = rng.permutation(np.arange(count) % 10)
    colours, grounds = (np.array([PALETTE[name] for name in ATTRIBUTES[what]], float)
                        for what in ("colour", "ground"))
    pairs = np.array([(a, b) for a in range(len(colours)) for b in range(len(grounds))
                      if (colours[a] != grounds[b]).any()])
    values["colour"], values["ground"] = pairs[rng.integers(len(pairs), size=count)].T

    # from a glyph's place about its centre to the canvas's, as parts of its side
    which = 2 * values["digit"] + values["weight"]
    extent = np.array([glyph.size for glyph in glyphs], float)[which]  # (count, 2): width, height
    low, high = np.array(list(HEIGHTS.values()))[values["size"]].T
    scale_y = rng.uniform(low, high) / extent[:, 1]
    scale_x = scale_y * rng.uniform(0.9, 1.1, count)
    slant = rng.uniform(-0.1, 0.1, count)
    zero = np.zeros(count)
    to_canvas = np.array([[scale_x, -slant * scale_y], [zero, scale_y]]).transpose(2, 0, 1)
    half = (np.abs(to_canvas) @ extent[:, :, None])[:, :, 0] / 2
    third = np.stack([values["place"] % 3, values["place"] // 3], 1)
    least = np.maximum(third / 3 + MARGIN, half)
    most = np.maximum(np.minimum((third + 1) / 3 - MARGIN, 1 - half), least)
    least = np.minimum(least, most)
    about = np.minimum(ABOUT, (most - least) / 2)
    middle = np.clip((third + 0.5) / 3, least + about, most - about)
    centre = (middle + about * rng.uniform(-1, 1, (count, 2))) * k
    to_glyph = np.linalg.inv(to_canvas * k)
    moved = extent / 2 - (to_glyph @ centre[:, :, None])[:, :, 0]
    affine = np.concatenate([to_glyph, moved[:, :, None]], 2).reshape(count, 6).tolist()
    images = np.empty((count, 3, size, size), np.uint8)
    for i in range(count):
        large = glyphs[which[i]].transform((k, k), Image.AFFINE, affine[i], Image.BILINEAR)
        share = np.asarray(large.reduce(k // size)) / 255
        ground = grounds[values["ground"][i]][:, None, None]
        colour = colours[values["colour"][i]][:, None, None]
        images[i] = (ground + share * (colour - ground)).round()
    captions = [caption(row) for row in zip(*(values[name] for name in ATTRIBUTES))]
    return images, values["digit"], captions
