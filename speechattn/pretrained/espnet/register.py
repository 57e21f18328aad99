"""Make ESPnet know this library's encoders."""

from __future__ import annotations

from speechattn.errors import ModelError

__all__ = ["register"]


def register() -> None:
    """An ESPnet config may say `encoder: speechattn_conformer`, `speechattn_ebranchformer`, `speechattn_transformer`.

    It holds for this process; `python -m speechattn.pretrained.espnet asr_train` does it for ESPnet's training.
    """
    try:
        from espnet2.tasks.asr import encoder_choices
    except ImportError as error:
        raise ModelError(
            f"ESPnet cannot be imported ({error}): pip install 'speechattn[espnet]' and "
            "pip install --no-deps espnet==202511"
        ) from error
    from speechattn.pretrained.espnet.encoders import ENCODERS

    encoder_choices.classes.update(ENCODERS)
