"""The command line: it only parses, shows and maps errors to exit codes; one file a command.

Exit codes: 0 done, 1 an error that is explained in one message, 2 wrong usage, 130 interrupted.
"""

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from graphcomp.base import distributed
from graphcomp.cli.bench import bench_command
from graphcomp.cli.calibrate_target import calibrate_target_command
from graphcomp.cli.compile import compile_command
from graphcomp.cli.console import interrupted, tell, warn
from graphcomp.cli.doctor import doctor_command
from graphcomp.cli.evaluate import evaluate_command
from graphcomp.cli.explain import explain_command
from graphcomp.cli.inspect import inspect_command
from graphcomp.cli.passes import passes_command
from graphcomp.cli.study import study_command
from graphcomp.errors import DistributedError, GraphcompError, GraphcompWarning

app = typer.Typer(
    name="graphcomp",
    help="Makes trained CNNs smaller and measurably faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: every deliberate error becomes one message and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    if not debug:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GraphcompWarning)
        warnings.showwarning = warn
    try:
        distributed.join()
        if not distributed.is_first():
            sys.stdout = sys.stderr = io.StringIO()  # one process speaks for all
        app(standalone_mode=True)
    except SystemExit as stop:
        if not stop.code:
            distributed.leave()
        elif distributed.is_first():  # wrong usage, in all of them alike
            distributed.said()
        else:
            distributed.wait_until_said()
        raise
    except GraphcompError as error:
        _fail(error, debug)
    except KeyboardInterrupt as error:
        interrupted(error)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        _fail(error, debug)
    except Exception:
        _speak_first()
        raise


def _speak_first() -> None:
    """Of several processes, the first one that fails says why; the others end without a word."""
    if not distributed.is_first_to_fail():
        distributed.wait_until_said()
        sys.exit(1)
    if not distributed.is_first():
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _fail(error: BaseException, debug: bool) -> None:
    _speak_first()
    if debug:
        raise error
    text = str(error) or type(error).__name__
    tell("error", "bold red", text)
    distributed.said()
    sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        from graphcomp import __version__

        print(__version__)
        raise typer.Exit
    count, command = distributed.world_size(), context.invoked_subcommand
    if count > 1 and command != "compile":
        raise DistributedError(
            f"graphcomp {command}: found {count} processes, expected one: only `graphcomp compile` runs in "
            "several; start it without torchrun"
        )


app.command("compile")(compile_command)
app.command("study")(study_command)
app.command("inspect")(inspect_command)
app.command("evaluate")(evaluate_command)
app.command("bench")(bench_command)
app.command("explain")(explain_command)
app.command("calibrate-target")(calibrate_target_command)
app.command("passes")(passes_command)
app.command("doctor")(doctor_command)
