"""What is said below the table of a result, wherever it is shown."""

from graphcomp.records import Report
from graphcomp.report.quantized import describe_quantized
from graphcomp.report.words import describe_dct, describe_half, describe_loss


def advice(report: Report) -> list[str]:
    """What became of its accuracy, and how its files are stored."""
    return [
        *describe_loss(report),
        *describe_dct(report),
        *describe_half(report),
        *describe_quantized(report),
    ]
