"""The text of a failure, for assertions that do not raise `Failure` yet."""

from __future__ import annotations

from pytest_attnheat.inputs import Operand, dtype_name


def build_message(
    assertion: str,
    claim: str,
    tensor: Operand,
    *,
    worst: str,
    first: str | None = None,
    cause: str | None = None,
    repeat: str | None = None,
    assumed: str | None = None,
    picture: str = "",
) -> str:
    """Lay out a failure message.

    Args:
        assertion: The name of the assertion.
        claim: How many places break what was claimed, of how many.
        tensor: What was checked, for its dtype, shape and device.
        worst: The worst place, with its value and the allowed value.
        first: The first place, None where it is the worst or says nothing more.
        cause: A likely cause, None where the numbers show none.
        repeat: What it takes to see the same again, for instance "seed=0".
        assumed: What was claimed on the caller's behalf.
        picture: Lines of text that show the place.

    Returns:
        The message, of several lines.
    """
    described = f"{dtype_name(tensor)} {tuple(tensor.shape)} on {tensor.device}"
    entries = {
        "worst": worst,
        "first": first,
        "cause": cause,
        "claim": assumed,
        "tensor": described,
        "repeat": repeat,
    }
    lines = [f"{assertion}: {claim}"]
    lines += [f"  {name:<9}{text}" for name, text in entries.items() if text is not None]
    lines.extend(f"  {line}".rstrip() for line in picture.splitlines())
    return "\n".join(lines)
