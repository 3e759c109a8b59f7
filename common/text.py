"""Captions and prompts: the words of a text, and their numbers.

    vocabulary = vocabulary_of(["a red seven", "a blue one"])      # in the order of the alphabet
    tokens = numbers(["a red one"], vocabulary, length=5)          # (1, 5): 1 5 4 0 0

The number 0 is "no word": it fills what a text leaves over, and all of a text that says nothing.
It knows no data set, no network and no method.
"""
import re
import unicodedata
from difflib import get_close_matches

import torch

LONGEST = 64  # words of a caption that are read
SHOWN = 60  # words of a vocabulary that an error lists

WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words_of(text):
    """The words of a text, in small letters; punctuation between them is not kept."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def vocabulary_of(texts):
    """All words of the texts, each once, sorted."""
    return sorted({word for text in texts for word in words_of(text)})


def numbers(texts, vocabulary, length):
    """Texts as tokens, int64 (n, length): 1 + a word's place in the vocabulary, and then zeros.

    Words beyond `length` are cut, and words that the vocabulary lacks are left out.
    """
    place = {word: 1 + i for i, word in enumerate(vocabulary)}
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        known = [place[word] for word in words_of(text) if word in place][:length]
        row[:len(known)] = torch.tensor(known)
    return tokens


def sentence(tokens, vocabulary):
    """The words of one row of tokens, as text."""
    return " ".join(vocabulary[number - 1] for number in tokens.tolist() if number)


def readable(texts, vocabulary, length, flag="prompt"):
    """ValueError of one line where a text says nothing, or what the vocabulary does not know."""
    known = {*vocabulary}
    for said in texts:
        words = words_of(said)
        if not words:
            raise ValueError(f"{flag} {said!r} has no words: say what to draw, or leave it out")
        strange = [word for word in words if word not in known]
        if strange:
            like = get_close_matches(strange[0], vocabulary, 1)
            meant = f" (did you mean {like[0]}?)" if like else ""
            more = f", and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            raise ValueError(f"{flag} {said!r}: this model has never read {strange[0]!r}{meant}. "
                             f"It knows {', '.join(vocabulary[:SHOWN])}{more}")
        if len(words) > length:
            raise ValueError(f"{flag} {said!r} has {len(words)} words, and this model reads "
                             f"{length} at most: say it in fewer")
