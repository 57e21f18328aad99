"""This library's encoders as ESPnet wants them: imported by `register` alone, since it needs ESPnet."""

from __future__ import annotations

from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor

from speechattn.attention.pattern import Span
from speechattn.encoder import Conformer, EBranchformer, Encoder, Transformer
from speechattn.frames import Frames

__all__ = ["ENCODERS", "EspnetConformer", "EspnetEBranchformer", "EspnetEncoder", "EspnetTransformer"]


class EspnetEncoder(AbsEncoder):  # type: ignore[misc]
    """An `Encoder` under ESPnet's interface; `encoder` is what streams when the training is done.

    Of each constructor `left`, `chunk` and `right` are the span, None as in `Span`; the defaults go to config.yaml.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def output_size(self) -> int:
        """Features of an output frame."""
        return self.encoder.dim

    def forward(self, xs_pad: Tensor, ilens: Tensor, prev_states: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        """Features [B, T, F] and lengths [B] -> frames [B, T', D] and lengths [B], the longest T'; no states."""
        y = self.encoder(Frames.from_lengths(xs_pad, ilens))
        lengths = y.lengths
        return y.values[:, : int(lengths.max())], lengths, None


class EspnetConformer(EspnetEncoder):
    """`encoder: speechattn_conformer`."""

    def __init__(
        self, input_size: int, dim: int = 256, depth: int = 12, heads: int = 4, inner: int = 2048,
        left: int | None = 64, chunk: int | None = 16, right: int = 0, kernel: int = 15, conv_right: int | None = 0,
        macaron: bool = True, factor: int = 4, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(Conformer(
            input_size, dim, depth, heads, inner, span=Span(left, chunk, right), kernel=kernel, conv_right=conv_right,
            macaron=macaron, factor=factor, dropout=dropout,
        ))  # fmt: skip


class EspnetEBranchformer(EspnetEncoder):
    """`encoder: speechattn_ebranchformer`."""

    def __init__(
        self, input_size: int, dim: int = 256, depth: int = 12, heads: int = 4, inner: int = 1024,
        left: int | None = 64, chunk: int | None = 16, right: int = 0, gate: int | None = None, kernel: int = 31,
        merge_kernel: int = 3, conv_right: int | None = 0, factor: int = 4, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(EBranchformer(
            input_size, dim, depth, heads, inner, span=Span(left, chunk, right), gate=gate, kernel=kernel,
            merge_kernel=merge_kernel, conv_right=conv_right, factor=factor, dropout=dropout,
        ))  # fmt: skip


class EspnetTransformer(EspnetEncoder):
    """`encoder: speechattn_transformer`."""

    def __init__(
        self, input_size: int, dim: int = 512, depth: int = 18, heads: int = 8, inner: int = 2048,
        left: int | None = 64, chunk: int | None = 16, right: int = 0, stack: int = 4, stride: int = 3,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(Transformer(
            input_size, dim, depth, heads, inner, span=Span(left, chunk, right), stack=stack, stride=stride,
            dropout=dropout,
        ))  # fmt: skip


ENCODERS: dict[str, type[EspnetEncoder]] = {
    "speechattn_conformer": EspnetConformer,
    "speechattn_ebranchformer": EspnetEBranchformer,
    "speechattn_transformer": EspnetTransformer,
}
