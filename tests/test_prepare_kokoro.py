"""Kokoro's symbols, sentences and voices; its model is stood in for."""

# ruff: noqa: RUF001 (letters of the phonetic alphabet)
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from speechattn.data.prepare import kokoro
from speechattn.data.prepare.synthetic import parse_cast
from speechattn.errors import InputError


def test_symbols_of_phonemes() -> None:
    assert len(kokoro.SYMBOLS) == len(set(kokoro.SYMBOLS.values())) == 108
    assert [kokoro.SYMBOLS[one] for one in ";. aɑəˈᵻAYz"] == [1, 4, 16, 43, 69, 83, 156, 177, 24, 41, 68]
    assert kokoro.respell("dʒˈeɪn ɡˈoʊz fˈɜːst", "en-us") == "ʤˈAn ɡˈOz fˈɜɹst"
    assert kokoro.respell("tʃˈɜːtʃ gˈəʊz", "en-gb-x-rp") == "ʧˈɜːʧ ɡˈQz"
    assert kokoro.respell("xˈeɪ", "es") == "xˈeɪ"


def test_long_sentences_are_cut_at_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kokoro, "phonemize", lambda text, language: [text, "ab."])
    pieces = list(kokoro.tokens("abcd " * 250, "en-us"))
    assert [len(piece) for piece in pieces] == [510, 510, 230, 3]
    assert pieces[0][-1] == kokoro.SYMBOLS[" "]
    assert pieces[3] == [43, 44, 4]
    assert [len(piece) for piece in kokoro.tokens("a" * 600 + "\u2603", "en-us")] == [510, 90, 3]


class Session:
    """Stands in for the model: as many samples as tokens, 100 each, and the first number of the style."""

    def get_inputs(self) -> list[argparse.Namespace]:
        return [argparse.Namespace(name=name) for name in ("tokens", "style", "speed")]

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert feed["tokens"][0, 0] == feed["tokens"][0, -1] == 0
        assert feed["style"].shape == (1, 256)
        n = round(2400 * feed["tokens"].shape[1] / float(feed["speed"][0]))
        return [np.full(n, feed["style"][0, 0])]


def test_kokoro_takes_the_style_of_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "voices").mkdir()
    for name in ("af_one", "bm_two", "jf_three", "xx_four"):
        np.repeat(np.arange(510, dtype=np.float32) / 1000, 256).tofile(tmp_path / f"voices/{name}.bin")
    (tmp_path / "model.onnx").write_bytes(b"model")
    monkeypatch.setattr(kokoro, "load", lambda folder: Session())
    monkeypatch.setattr(kokoro, "phonemize", lambda text, language: [text] if text else [])
    one, two = parse_cast([f"kokoro:{tmp_path}"]).voices
    assert (one.speaker, two.speaker) == ("kokoro-af_one", "kokoro-bm_two")
    x = one.say("abcd", 1.0)
    assert len(x) == 6 * 1600
    assert np.median(x) == pytest.approx(0.003, abs=1e-5)
    assert len(one.say("abcd", 2.0)) == 3 * 1600
    with pytest.raises(InputError, match="no sounds"):
        one.say("", 1.0)
    for name, message in [
        (f"kokoro:{tmp_path}#jf_three", "begin with one of"),
        (f"kokoro:{tmp_path}#af_none", "af_none.bin: No such file"),
        ("kokoro", "name the folder"),
        (f"kokoro:{tmp_path / 'voices'}", "no English voices"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_cast([name])
    (tmp_path / "voices/af_short.bin").write_bytes(bytes(40))
    with pytest.raises(InputError, match="10 numbers, not 510 x 256"):
        parse_cast([f"kokoro:{tmp_path}#af_short"])
    (tmp_path / "other.onnx").touch()
    with pytest.raises(InputError, match="2 files end in"):
        kokoro.find_model(tmp_path)


def test_piper_writes_kokoros_phonemes() -> None:
    pytest.importorskip("piper")
    jane, why = kokoro.phonemize("Jane goes out. Why?", "en-us")
    assert jane.startswith("ʤˈAn ɡ")
    assert jane.endswith("ˈWt.")
    assert why == "wˈI?"
    with pytest.raises(InputError, match="cannot write xx down"):
        kokoro.phonemize("a", "xx")
