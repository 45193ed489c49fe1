"""Pieces of text: whole characters whatever the tokens cut through, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.fakes import byte_fallback, byte_level
from mambaquant_ext.generation import IncrementalDecoder, StopFilter

TEXT = "Größe ≠ 漢字 🙂🏽 e\u0301 \ufffd end"
WORDS = [" the", "ing", "\ufffd", b"\xe2\x82", b"\xac and", b"\x9f\x98\x80 \xf0", "漢字"]
TOKENIZER = byte_level(WORDS)
END = 256 + len(WORDS)


def pieces_of(tokenizer, ids, prompt=()):
    decoder = IncrementalDecoder(tokenizer, prompt)
    return [decoder.push(token) for token in ids] + [decoder.finish()]


# Decoding


def test_a_character_comes_with_its_last_byte():
    pieces = pieces_of(TOKENIZER, list("a🙂é".encode()))
    assert pieces == ["a", "", "", "", "🙂", "", "é", ""]


def test_every_byte_of_a_text_by_itself():
    pieces = pieces_of(TOKENIZER, list(TEXT.encode()) * 5)
    assert "".join(pieces) == TEXT * 5
    assert all("\ufffd" not in piece or piece.startswith("\ufffd") for piece in pieces)


def test_a_replacement_character_of_the_model_itself_is_kept():
    assert "".join(pieces_of(TOKENIZER, [65, 258, 258, 66, 258])) == "A\ufffd\ufffdB\ufffd"


def test_an_unfinished_character_shows_at_the_end():
    assert pieces_of(TOKENIZER, [65, 0xF0, 0x9F]) == ["A", "", "", "\ufffd"]


def test_special_tokens_have_no_text():
    assert pieces_of(TOKENIZER, [65, END, 66, END]) == ["A", "", "B", "", ""]


@given(ids=st.lists(st.integers(0, END), max_size=120))
def test_the_pieces_are_the_text_whatever_the_tokens(ids):
    assert "".join(pieces_of(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(st.lists(st.sampled_from([0x80, 0xE2, 0x82, 0xF0, 0x9F, 0x98, 0xC3, 65]), max_size=150))
def test_the_pieces_are_the_text_even_if_it_is_hardly_one(ids):
    assert "".join(pieces_of(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, END), max_size=60), cut=st.integers(0, 60))
def test_a_prompt_is_context_and_not_text(ids, cut):
    prompt, rest = ids[:cut], ids[cut:]
    whole, before = TOKENIZER.decode(ids), TOKENIZER.decode(prompt).rstrip("\ufffd")
    assert before + "".join(pieces_of(TOKENIZER, rest, prompt)) == whole


SPACED = byte_fallback(["▁hello", "▁world", "!", "▁"])


PARTS = st.lists(st.sampled_from(["hello", "world", "!", " ", "🙂", "ß", "漢"]), max_size=60)


@given(prompt=PARTS, parts=PARTS)
def test_spaces_and_fallback_bytes_of_sentencepiece(prompt, parts):
    names = {"hello": [256], "world": [257], "!": [258], " ": [259]}
    before, ids = (
        [token for part in some for token in names.get(part, list(part.encode()))]
        for some in (["!", *prompt], parts)
    )
    assert "".join(pieces_of(SPACED, ids)) == SPACED.decode(ids)
    # Behind a prompt the first word keeps its space.
    continued = "".join(pieces_of(SPACED, ids, before))
    assert SPACED.decode(before) + continued == SPACED.decode(before + ids)


def test_no_token_is_decoded_more_than_a_constant_number_of_times():
    class Counting:
        decoded = 0

        def decode(self, ids, *, skip_special_tokens):
            self.decoded += len(ids)
            return TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)

    counts = {}
    for ids in (TEXT.encode() * 100, b"\x80" * 2000):
        for length in (1000, 2000):
            counting = Counting()
            pieces_of(counting, ids[:length])
            counts[length] = counting.decoded
        assert counts[2000] < 2.1 * counts[1000]


# Stop strings


def filtered(stop, pieces):
    stops = StopFilter(stop)
    out = [stops.push(piece) for piece in pieces]
    return out if stops.stopped else [*out, stops.finish()], stops.stopped


def test_without_stop_strings_text_passes():
    assert filtered((), ["a", "", "b"]) == (["a", "", "b", ""], False)


def test_a_stop_string_over_several_pieces():
    assert filtered(("\n\nQ:",), ["A: 4", "\n", "\nQ", ": what"]) == (["A: 4", "", "", ""], True)


def test_what_only_began_like_a_stop_string_is_let_out():
    assert filtered(("END",), ["x E", "N", "ough E"]) == (["x ", "", "ENough ", "E"], False)


def test_a_beginning_inside_a_beginning():
    assert filtered(("aab",), ["a", "a", "a", "b", "c"]) == (["", "", "a", "", ""], True)


def test_nothing_comes_behind_the_stop_string():
    stops = StopFilter(["."])
    assert [stops.push("a.b"), stops.push("c"), stops.push(".")] == ["a", "", ""]
    assert stops.stopped


@pytest.mark.parametrize(
    ("stop", "text", "before"),
    [
        (("abcd", "bc"), "xabcd", "xa"),  # "bc" is complete first
        (("bc", "abc"), "xabc", "x"),  # both at once: the longest
        (("b", "a"), "xab", "x"),
        (("xyz",), "xyxyz", "xy"),
    ],
)
def test_which_stop_string_counts(stop, text, before):
    for pieces in ([text], list(text)):
        out, stopped = filtered(stop, pieces)
        assert ("".join(out), stopped) == (before, True)


def before_first_stop(stop, text):
    """The text before the stop string that ends first, the longest of those; and whether there is one."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
)
def test_the_cut_does_not_depend_on_the_pieces(stop, pieces):
    out, stopped = filtered(stop, pieces)
    text = "".join(pieces)
    assert ("".join(out), stopped) == before_first_stop(stop, text)
    # Nothing is held back that cannot become a stop string, and nothing let out that can.
    let_out = ""
    for i, piece in enumerate(out[: len(pieces)]):
        let_out += piece
        if before_first_stop(stop, "".join(pieces[: i + 1]))[1]:
            break
        held = "".join(pieces[: i + 1])[len(let_out) :]
        assert held == max(
            (
                s[:n]
                for s in stop
                for n in range(len(s))
                if "".join(pieces[: i + 1]).endswith(s[:n])
            ),
            key=len,
            default="",
        )
