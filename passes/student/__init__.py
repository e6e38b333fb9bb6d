"""student: see `graphcomp.passes.student.student`."""

from graphcomp.passes.student.student import Student

__all__ = ["Student"]
