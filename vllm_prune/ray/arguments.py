"""Options of a replica's engine, read by ``vllm serve``'s own parser: the same names, the same values, the same refusals."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any, NoReturn

from vllm_prune.errors import PruneError


def command_line(engine: dict[str, Any]) -> list[str]:
    """``engine`` as one would write it after ``vllm serve MODEL``. A field that is null is left out.

    Raises:
        ValueError: a value that no command line can hold, or one of a list that would be read as another option.
    """
    said: list[str] = []
    for name, value in engine.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            said.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            said.append(f"--{flag}={json.dumps(value)}")
        elif isinstance(value, list):
            values = [json.dumps(one) if isinstance(one, dict) else str(one) for one in value]
            if any(one.startswith("-") for one in values):
                raise ValueError(f"{name} has a value that begins with a dash")
            said += [f"--{flag}", *values]
        else:
            said.append(f"--{flag}={value}")
    return said


def serve_arguments(engine: dict[str, Any]) -> Namespace:
    """What vLLM's server would have parsed. Runs in an engine replica.

    Raises:
        PruneError: an option that ``vllm serve`` does not know, or a value that it does not take.
    """
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ModuleNotFoundError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    way_out = "Correct `engine`: its fields are the options of `vllm serve`, with underscores."

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise PruneError(f"vLLM does not take the engine options: {message.rstrip('.')}.", way_out)

        def print_help(self, file: Any = None) -> None:
            return

        def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
            self.error(message or "one of them asks for help and ends the program")

    try:
        args = make_arg_parser(Parser(prog="engine", allow_abbrev=False)).parse_args(command_line(engine))
        validate_parsed_serve_args(args)
    except PruneError:
        raise
    except RecursionError:
        raise PruneError("vLLM does not take the engine options: one is nested too deep.", way_out) from None
    except IndexError:  # its reader of dotted names looks behind the last word
        raise PruneError(
            "vLLM does not take the engine options: one with a dot in its name has no value.", way_out
        ) from None
    except (TypeError, ValueError) as error:
        raise PruneError(f"vLLM does not take the engine options: {str(error).rstrip('.')}.", way_out) from None
    return args
