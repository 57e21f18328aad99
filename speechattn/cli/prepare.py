"""`speechattn prepare CORPUS ... FOLDER`: sounds and manifests for training and evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speechattn.audio.vision import Box
from speechattn.data.prepare.manifests import manifest_path, prepared
from speechattn.data.prepare.sound import AUDIO_FORMATS
from speechattn.data.prepare.transcripts import read_lines
from speechattn.errors import InputError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """One command for each corpus."""
    parser = commands.add_parser("prepare", help="corpora as sounds and manifests", allow_abbrev=False)
    corpora = parser.add_subparsers(dest="corpus", metavar="CORPUS", required=True)
    for add in (add_fotaq, add_tuxpaint, add_librispeech, add_must_c, add_folder, add_synthetic, add_avsynth, add_lrs3):
        add(corpora)


def add_corpus(corpora: Any, name: str, told: str) -> argparse.ArgumentParser:
    """A command with the options that all have but the folder, which comes last."""
    parser: argparse.ArgumentParser = corpora.add_parser(name, help=told, description=told, allow_abbrev=False)
    parser.add_argument(
        "--audio-format", default="flac", choices=AUDIO_FORMATS,
        help="of sounds that must be written: flac (default), wav, or ogg (Opus, about 30 kbit/s)",
    )  # fmt: skip
    return parser


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word for word in text.split(",") if word]


def add_target(parser: argparse.ArgumentParser) -> None:
    """Where the manifests go."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where manifests (and new sounds) are written")


def add_fotaq(corpora: Any) -> None:
    """Options of `prepare fotaq`."""
    parser = add_corpus(corpora, "fotaq", "Flight of the Amazon Queen: 2.6 h of voice-acted English (Debian package)")
    add_target(parser)
    parser.set_defaults(run=run_fotaq)


def run_fotaq(options: argparse.Namespace) -> int:
    """Fetch it, write three parts."""
    from speechattn.data import fotaq

    fotaq.prepare(options.folder, audio_format=options.audio_format)
    for split in ("train", "dev", "test"):
        report(options.folder, "fotaq", split)
    return 0


def add_tuxpaint(corpora: Any) -> None:
    """Options of `prepare tuxpaint`."""
    told = "Tux Paint: 1 to 2 s descriptions in nine languages, with English (Debian package)"
    parser = add_corpus(corpora, "tuxpaint", told)
    parser.add_argument("--languages", type=words, metavar="CODES", help="such as es,fr,ru (default: all nine)")
    parser.add_argument("--package", metavar="FILE", type=Path, help="the .deb, where it is at hand")
    add_target(parser)
    parser.set_defaults(run=run_tuxpaint)


def run_tuxpaint(options: argparse.Namespace) -> int:
    """Fetch it, write three parts of each language."""
    from speechattn.data.prepare import tuxpaint

    names = tuxpaint.prepare(
        options.folder, options.languages or tuxpaint.LANGUAGES, audio_format=options.audio_format,
        package=options.package,
    )  # fmt: skip
    for name in names:
        for split in tuxpaint.SPLITS:
            report(options.folder, name, split)
    return 0


def add_librispeech(corpora: Any) -> None:
    """Options of `prepare librispeech`."""
    parser = add_corpus(corpora, "librispeech", "LibriSpeech: 960 h of read English, or 5 h of it (mini)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--download", choices=("full", "mini"), help="fetch it into FOLDER (60 GB, mini 0.5 GB)")
    source.add_argument("--corpus", metavar="FOLDER", type=Path, help="a local copy")
    parser.add_argument("--parts", type=words, metavar="PARTS", help="such as train-clean-100,dev-clean (default: all)")
    add_target(parser)
    parser.set_defaults(run=run_librispeech)


def run_librispeech(options: argparse.Namespace) -> int:
    """Fetch it where that is asked for, write a part each."""
    from speechattn.data.prepare import librispeech

    corpus = options.corpus
    if options.download:
        parts = options.parts or list(librispeech.MINI if options.download == "mini" else librispeech.PARTS)
        corpus = librispeech.download(options.folder, parts)
    for part in librispeech.prepare(corpus, options.folder, options.parts, audio_format=options.audio_format):
        report(options.folder, "librispeech", part, expected=librispeech.expected(part))
    return 0


def add_must_c(corpora: Any) -> None:
    """Options of `prepare must_c`."""
    parser = add_corpus(corpora, "must_c", "MuST-C: English talks with translations, from a local copy")
    parser.add_argument("--corpus", metavar="FOLDER", type=Path, required=True, help="the folder that holds en-XX/data")
    parser.add_argument("--language", metavar="CODE", required=True, help="of the translation: de, es, fr, ...")
    parser.add_argument("--splits", type=words, help="default train,dev,tst-COMMON,tst-HE")
    add_target(parser)
    parser.set_defaults(run=run_must_c)


def run_must_c(options: argparse.Namespace) -> int:
    """Write a part each."""
    from speechattn.data.prepare import must_c

    splits = options.splits or list(must_c.SPLITS)
    name = must_c.prepare(options.corpus, options.folder, options.language, splits, audio_format=options.audio_format)
    for split in splits:
        report(options.folder, name, split)
    return 0


def add_folder(corpora: Any) -> None:
    """Options of `prepare folder`."""
    parser = add_corpus(corpora, "folder", "one's own recordings with a transcript file")
    parser.add_argument("audio", metavar="AUDIO", type=Path, help="the folder that paths of recordings are relative to")
    parser.add_argument(
        "--transcripts", metavar="FILE", type=Path, required=True,
        help="TSV (path, text; or with a header), JSONL, or a Kaldi folder (wav.scp, text, segments, utt2spk)",
    )  # fmt: skip
    parser.add_argument(
        "--split-share", type=words, default=[], metavar="SHARES",
        help="such as dev=0.05,test=0.1: by speaker where all have one, else by utterance (default: all is train)",
    )  # fmt: skip
    parser.add_argument("--split-by", choices=("speaker", "utterance"), help="what is kept together, where it matters")
    parser.add_argument("--name", default="own", help="name of the corpus (default own)")
    parser.add_argument("--language", default="en", help="spoken, where the file does not say (default en)")
    parser.add_argument("--translation-language", metavar="CODE", help="of translations, where the file has some")
    add_target(parser)
    parser.set_defaults(run=run_folder)


def run_folder(options: argparse.Namespace) -> int:
    """Write a part each."""
    from speechattn.data.prepare import folder

    splits = folder.prepare(
        options.audio, options.folder, options.transcripts, name=options.name, language=options.language,
        translation_language=options.translation_language, shares=folder.parse_shares(options.split_share),
        split_by=options.split_by, audio_format=options.audio_format,
    )  # fmt: skip
    for split in splits:
        report(options.folder, options.name, split)
    return 0


def add_synthetic(corpora: Any) -> None:
    """Options of `prepare synthetic`."""
    parser = add_corpus(corpora, "synthetic", "speech for a text file, one utterance per line, read by many voices")
    parser.add_argument("text", metavar="TEXT", type=Path, help="UTF-8, one utterance per line")
    parser.add_argument(
        "--voices", type=words, default=["piper", "flite"], metavar="VOICES",
        help="ENGINE or ENGINE:NAME, with =WEIGHT if wanted: piper:FILE.onnx=5,piper:FILE.onnx#3,"
        "kokoro:FOLDER,kokoro:FOLDER#af_heart,flite:slt,espeak:en-us+f3 (default: piper,flite)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="with the line, decides who reads it (default 0)")
    parser.add_argument(
        "--speeds", nargs=2, type=float, default=(0.9, 1.1), metavar=("SLOW", "FAST"), help="default 0.9 1.1"
    )
    parser.add_argument("--takes", type=int, default=1, metavar="N", help="read each line N times (default 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="lines read at a time (default 1)")
    parser.add_argument("--split", default="train", help="name of the part (default train)")
    parser.add_argument("--name", default="synthetic", help="name of the corpus (default synthetic)")
    parser.add_argument("--language", default="en", help="what the text is in (default en)")
    parser.add_argument("--translations", metavar="FILE", type=Path, help="as many lines, in another language")
    parser.add_argument("--translation-language", metavar="CODE", help="what these are in")
    add_target(parser)
    parser.set_defaults(run=run_synthetic)


def run_synthetic(options: argparse.Namespace) -> int:
    """Read the lines, write one part."""
    from speechattn.data.prepare import synthetic

    if options.jobs < 1 or options.takes < 1:
        raise InputError("--jobs and --takes: at least 1")
    if (options.translations is None) != (options.translation_language is None):
        raise InputError("--translations and --translation-language belong together")
    cast = synthetic.parse_cast(options.voices, (options.speeds[0], options.speeds[1]))
    synthetic.prepare(
        options.folder, read_lines(options.text), cast, split=options.split, name=options.name,
        language=options.language, seed=options.seed, takes=options.takes, jobs=options.jobs,
        audio_format=options.audio_format,
        translations=None if options.translations is None else read_lines(options.translations),
        translation_language=options.translation_language,
    )  # fmt: skip
    report(options.folder, options.name, options.split)
    return 0


def add_avsynth(corpora: Any) -> None:
    """Options of `prepare avsynth`."""
    parser = add_corpus(corpora, "avsynth", "synthetic speech for a text file, each line with video of a drawn mouth")
    parser.add_argument("text", metavar="TEXT", type=Path, help="UTF-8, one utterance per line")
    parser.add_argument(
        "--voices", type=words, default=["flite:slt", "flite:rms", "flite:awb", "espeak"], metavar="VOICES",
        help="as of `prepare synthetic`, of espeak and flite (default: flite:slt,flite:rms,flite:awb,espeak)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="decides who reads, who is seen, how they move (default 0)")
    parser.add_argument(
        "--speeds", nargs=2, type=float, default=(0.9, 1.1), metavar=("SLOW", "FAST"), help="default 0.9 1.1"
    )
    parser.add_argument("--takes", type=int, default=1, metavar="N", help="read each line N times (default 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="clips made at a time (default 1)")
    parser.add_argument("--babble", type=float, metavar="DB", help="speech so much louder than babble around it")
    parser.add_argument("--talkers", type=int, metavar="N", help="of the babble, from the same part (default 6)")
    parser.add_argument("--split", default="train", help="name of the part (default train)")
    parser.add_argument("--name", default="avsynth", help="name of the corpus (default avsynth)")
    add_target(parser)
    parser.set_defaults(run=run_avsynth)


def run_avsynth(options: argparse.Namespace) -> int:
    """Read and film the lines, write one part."""
    from speechattn.data.prepare import avsynth, synthetic

    if options.jobs < 1 or options.takes < 1:
        raise InputError("--jobs and --takes: at least 1")
    if options.babble is None and options.talkers is not None:
        raise InputError("--talkers is of --babble, which says how loud")
    talkers = 6 if options.talkers is None else options.talkers
    noise = None if options.babble is None else avsynth.Babble(options.babble, talkers)
    cast = synthetic.parse_cast(options.voices, (options.speeds[0], options.speeds[1]))
    avsynth.prepare(
        options.folder, read_lines(options.text), cast, split=options.split, name=options.name, seed=options.seed,
        takes=options.takes, jobs=options.jobs, audio_format=options.audio_format, noise=noise,
    )  # fmt: skip
    report(options.folder, options.name, options.split)
    return 0


def add_lrs3(corpora: Any) -> None:
    """Options of `prepare lrs3`."""
    told = "LRS3-TED: faces and sound of talks, from a local copy, as published or as auto_avsr's preparation leaves it"
    parser = add_corpus(corpora, "lrs3", told)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the folder that holds pretrain, trainval and test")
    parser.add_argument("--split", required=True, choices=("pretrain", "trainval", "test"), help="the part")
    parser.add_argument(
        "--box", type=box, metavar="L,T,W,H",
        help="where mouths are in the pictures, in pixels, the same for all: rough (default 56,56,112,112)",
    )  # fmt: skip
    parser.add_argument(
        "--longest-s", type=float, default=16.0, metavar="S", help="longer clips are cut between words (default 16)"
    )
    parser.add_argument("--valid-talks", type=int, default=0, metavar="N", help="the last N talks become a part valid")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="clips made at a time (default 1)")
    add_target(parser)
    parser.set_defaults(run=run_lrs3)


def box(text: str) -> Box:
    """Four numbers between commas."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: wanted left, top, width and height: 56,56,112,112")
    return Box(*map(int, numbers))


def run_lrs3(options: argparse.Namespace) -> int:
    """Write one part, or two."""
    from speechattn.data.prepare import lrs3

    if options.jobs < 1:
        raise InputError("--jobs: at least 1")
    names = lrs3.prepare(
        options.source, options.folder, options.split, box=options.box, longest_s=options.longest_s,
        valid_talks=options.valid_talks, jobs=options.jobs, audio_format=options.audio_format,
    )  # fmt: skip
    for name in names:
        report(options.folder, "lrs3", name)
    return 0


def report(folder: Path, name: str, split: str, *, expected: int | None = None) -> None:
    """One line of what is there, and where."""
    written = prepared(folder, name, split)
    assert written is not None
    cuts, skipped = (manifest_path(folder, name, kind, split) for kind in ("cuts", "skipped"))
    left = f"; {written.skipped} left out, see {skipped}" if written.skipped else ""
    lacking = f"; the published part has {expected}" if expected not in (None, written.utterances) else ""
    print(f"{name} {split}: {written.utterances} utterances, {length(written.hours)}: {cuts}{left}{lacking}")


def length(hours: float) -> str:
    """In hours, or in minutes where that says more."""
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
