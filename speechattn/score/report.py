"""What a person wants to know of an evaluation, in Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from speechattn.score.alignment import Edit, confusions, counts, edits
from speechattn.score.document import Aligned, Block, Picture, Table, Text, Title, to_html, to_markdown
from speechattn.score.evaluation import Evaluation
from speechattn.score.plots import by_duration, by_speaker, computing, two_ways

__all__ = ["report", "write_report"]

MOST = 20
MOST_CONFUSIONS = 12
PLOTS = "plots"


def write_report(evaluation: Evaluation, folder: Path, *, title: str, facts: Mapping[str, str]) -> None:
    """`report.md` with its `plots`, and `report.html`, which needs no other file."""
    blocks = report(evaluation, title=title, facts=facts)
    (folder / PLOTS).mkdir(exist_ok=True)
    for block in blocks:
        if isinstance(block, Picture):
            (folder / PLOTS / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(blocks, pictures=PLOTS), encoding="utf-8")
    (folder / "report.html").write_text(to_html(blocks), encoding="utf-8")


def report(evaluation: Evaluation, *, title: str, facts: Mapping[str, str]) -> list[Block]:
    """All of it; `facts` say how the figures came about."""
    table = evaluation.table()
    alignments = {way: evaluation.edits(way) for way in evaluation.ways}
    blocks: list[Block] = [
        Title(title, 1),
        Table(table[0], table[1:]),
        Text(
            f"{len(evaluation.heard)} utterances, {evaluation.audio_s:.1f} s of sound; {evaluation.label}. In brackets "
            "95 % intervals of a bootstrap over utterances, of the difference in pairs; p by approximate randomisation."
        ),
    ]
    if not evaluation.streams:
        blocks.append(Text("This model needs whole utterances: it was not streamed."))
    if evaluation.failed:
        blocks.append(Text(f"{len(evaluation.failed)} utterances could not be heard; they are listed at the end."))
    if not evaluation.translates:
        blocks += kinds(alignments)
    blocks += plots(evaluation)
    if not evaluation.translates:
        blocks += frequent(alignments)
    blocks += worst(evaluation, alignments)
    if evaluation.streams:
        blocks += apart(evaluation)
    blocks += [Title("How"), Table(["", ""], list(facts.items()), 2)]
    if evaluation.failed:
        blocks += [Title("Not heard"), Table(["utterance", "why"], [[f.id, f.failed] for f in evaluation.failed], 2)]
    looped = [said for said in evaluation.heard if said.withheld]
    if looped:
        rows = [[said.id, said.withheld[:200]] for said in looped]
        blocks += [Title("Withheld as loops"), Table(["utterance", "text"], rows, 2)]
    return blocks


def kinds(alignments: Mapping[str, Sequence[Sequence[Edit]]]) -> list[Block]:
    """How many words were wrong in which way, over utterances whose reference has words."""
    rows = []
    for way, rows_of in alignments.items():
        found = [counts(row) for row in rows_of]
        s, i, d, n = (sum(column) for column in zip(*(row for row in found if row[3]), strict=True))
        rows.append([way, *(f"{value} ({100 * value / n:.2f} %)" for value in (s, i, d, s + i + d)), str(n)])
    return [Title("Errors"), Table(["", "substituted", "inserted", "deleted", "all errors", "words"], rows)]


def plots(evaluation: Evaluation) -> list[Block]:
    """Those for which there is something to show, each with its caption."""
    drawn = [by_duration(evaluation), by_speaker(evaluation), two_ways(evaluation), computing(evaluation)]
    blocks: list[Block] = [Title("Plots")]
    for one in drawn:
        if one is not None:
            blocks += [Text(one.says[0].upper() + one.says[1:] + "."), one]
    return blocks


def frequent(alignments: Mapping[str, Sequence[Sequence[Edit]]]) -> list[Block]:
    """The errors that are made most often."""
    blocks: list[Block] = [Title("Most frequent errors")]
    for way, rows_of in alignments.items():
        rows = [
            [edit.kind, edit.reference or "-", edit.hypothesis or "-", str(times)]
            for edit, times in confusions(rows_of, most=MOST_CONFUSIONS)
        ]
        if rows:
            blocks += [Text(f"{way.capitalize()}:"), Table(["kind", "said", "heard", "times"], rows, 3)]
        else:
            blocks.append(Text(f"{way.capitalize()}: none."))
    return blocks


def worst(evaluation: Evaluation, alignments: Mapping[str, Sequence[Sequence[Edit]]]) -> list[Block]:
    """The utterances with most errors, whichever way; for translations those with the lowest chrF."""
    score = badness(evaluation, alignments)
    order = sorted((i for i, bad in enumerate(score) if bad > 0), key=lambda i: -score[i])[:MOST]
    blocks: list[Block] = [Title("Worst utterances")]
    if not order:
        return [*blocks, Text("None has an error.")]
    blocks.append(Text("What was said but not heard is struck out; what was heard instead or besides stands out."))
    for i in order:
        blocks.append(Title(heading(evaluation, i), 3))
        rows = {way: alignments[way][i] for way in evaluation.ways}
        if len(rows) > 1 and rows["offline"] == rows["streamed"]:
            blocks.append(Aligned("both", rows["offline"]))
        else:
            blocks += [Aligned(way, row) for way, row in rows.items()]
    return blocks


def badness(evaluation: Evaluation, alignments: Mapping[str, Sequence[Sequence[Edit]]]) -> list[float]:
    """How bad each utterance is, both ways together."""
    if evaluation.translates:
        how = evaluation.metrics[-1]
        stats = evaluation.stats[how.name]
        return [sum(100 - float(how.score(part[i][None])[0]) for part in stats) for i in range(len(evaluation.heard))]
    return [sum(sum(counts(rows[i])[:3]) for rows in alignments.values()) for i in range(len(evaluation.heard))]


def heading(evaluation: Evaluation, i: int) -> str:
    """Which utterance, whose, and how long."""
    one, said = evaluation.utterances[i], evaluation.heard[i]
    return ", ".join([one.id, *([one.speaker] if one.speaker else []), f"{said.duration_s:.1f} s"])


def apart(evaluation: Evaluation) -> list[Block]:
    """Where streaming says something else."""
    pairs = list(zip(evaluation.texts("offline"), evaluation.texts("streamed"), strict=True))
    found = [edits(offline, streamed) for offline, streamed in pairs]
    changed = [sum(edit.kind != "equal" for edit in row) for row in found]
    order = sorted((i for i, many in enumerate(changed) if many), key=lambda i: -changed[i])
    if not order:
        return [Title("Where streaming differs"), Text("Nowhere: every text is the same, word for word.")]
    share = f"In {len(order)} of {len(pairs)} utterances"
    more = f" The {MOST} that differ most:" if len(order) > MOST else ""
    blocks: list[Block] = [
        Title("Where streaming differs"),
        Text(f"{share}. Struck out is what was heard offline, and beside it what was heard streamed.{more}"),
    ]
    for i in order[:MOST]:
        blocks += [Title(heading(evaluation, i), 3), Aligned("streamed", found[i])]
    return blocks
