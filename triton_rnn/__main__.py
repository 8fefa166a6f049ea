"""``python -m triton_rnn``: ``demo`` shows the package at work, ``info`` says what runs here,
``profile`` what a layer spends its time on.

matplotlib, rich and the demos themselves are imported by the commands, so that ``--help`` and wrong
options answer at once.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from triton_rnn.version import __version__

_DEMO_NEEDS = ("matplotlib", "numpy", "rich")
# What a demo does where the command line does not say otherwise. A larger lr learns faster, but
# then rounding grows from step to step until the two losses are seen to differ.
_DEFAULTS: dict[str, dict[str, int | float]] = {
    "text": {"hidden": 128, "layers": 1, "steps": 500, "batch": 16, "seq_len": 64, "lr": 2e-3},
    "series": {"hidden": 32, "layers": 1, "steps": 400, "batch": 32, "seq_len": 6, "lr": 3e-3},
}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 a failed run, 2 a bad request, 130 Ctrl-C.

    Raises:
        SystemExit: from argparse, on ``--help``, ``--version`` and wrong options.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.command == "info":
            from triton_rnn import info

            info.show(as_json=options.json)
            return 0
        return _profile(options) if options.command == "profile" else _demo(options)
    except KeyboardInterrupt:
        print("\ntriton_rnn: interrupted; no file was left half written", file=sys.stderr)
        return _INTERRUPTED


def _demo(options: argparse.Namespace) -> int:
    program = f"python -m triton_rnn demo {options.demo}"
    missing = [name for name in _DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        install = "pip install 'triton_rnn[demo]'"
        print(f"{program}: {', '.join(missing)} missing: {install}", file=sys.stderr)
        return 2
    from triton_rnn.demo import report
    from triton_rnn.demo.settings import (
        DemoError,
        Settings,
        check_output_folder,
        resolve_backend,
        resolve_device,
    )

    sizes = dict(_DEFAULTS[options.demo])
    sizes.update({name: value for name in sizes if (value := getattr(options, name)) is not None})
    try:
        check_output_folder(options.out)
        settings = Settings(
            demo=options.demo,
            cell=options.cell,
            hidden=int(sizes["hidden"]),
            layers=int(sizes["layers"]),
            steps=int(sizes["steps"]),
            batch=int(sizes["batch"]),
            seq_len=int(sizes["seq_len"]),
            lr=float(sizes["lr"]),
            seed=options.seed,
            device=resolve_device(options.device),
            backend=resolve_backend(options.backend),
            out=options.out,
        )
        report.run(settings)
    except DemoError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _profile(options: argparse.Namespace) -> int:
    from triton_rnn.demo.settings import (
        DemoError,
        check_output_folder,
        resolve_backend,
        resolve_device,
    )
    from triton_rnn.dispatch import BackendError
    from triton_rnn.profiling import command

    try:
        if options.packed and options.batch == 1:
            raise DemoError("--packed needs --batch 2 or more: sequences of different lengths")
        check_output_folder(options.out)
        job = command.Job(
            cell=options.cell,
            hidden=options.hidden,
            input=options.input or options.hidden,
            batch=options.batch,
            seq_len=options.seq_len,
            layers=options.layers,
            bidirectional=options.bidirectional,
            packed=options.packed,
            dtype=options.dtype,
            device=resolve_device(options.device),
            backend=resolve_backend(options.backend),
            training=options.mode == "training",
            steps=options.steps,
        )
        command.run(job, options.out)
    except (DemoError, BackendError) as error:
        print(f"python -m triton_rnn profile: error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, DemoError) else 2
    except OSError as error:
        print(
            f"python -m triton_rnn profile: error: cannot write into {options.out}: {error}",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m triton_rnn",
        description="Drop-in torch.nn.RNN, GRU, LSTM and their cells that run faster.",
    )
    parser.add_argument("--version", action="version", version=f"triton_rnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train one model with torch.nn and with triton_rnn, and compare them",
        description=(
            "Train the same model twice from one seed, with torch.nn's recurrent layer and with"
            " triton_rnn's, and compare losses and step times. text: a character model on the prose"
            " of Python's manual. series: the yearly sunspot number from the six years before."
        ),
    )
    _add_demo_options(demo)
    info = commands.add_parser(
        "info",
        help="versions, devices, and which backends run here",
        description="Versions, devices, which backends run here, and why the others cannot.",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    profile = commands.add_parser(
        "profile",
        help="what a layer spends its time on: a table by phase, a trace and a timeline",
        description=(
            "Run a layer under torch.profiler and print the time of each of its phases beside what"
            " this machine can do; write trace.json, timeline.png and profile.json."
        ),
    )
    _add_profile_options(profile)
    return parser


def _add_profile_options(profile: argparse.ArgumentParser) -> None:
    profile.add_argument("--cell", choices=("rnn", "rnn-relu", "gru", "lstm"), default="lstm")
    for name, value, meaning in (
        ("hidden", 128, "units of each layer"),
        ("input", None, "size of the input (default: as --hidden)"),
        ("batch", 8, "sequences"),
        ("seq-len", 100, "steps of a sequence"),
        ("layers", 1, "layers"),
        ("steps", 20, "how often to run it"),
    ):
        text = meaning if value is None else f"{meaning} (default: {value})"
        profile.add_argument(f"--{name}", type=_positive_int, default=value, metavar="N", help=text)
    profile.add_argument("--bidirectional", action="store_true", help="two directions")
    profile.add_argument("--packed", action="store_true", help="sequences of different lengths")
    profile.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32"
    )
    profile.add_argument(
        "--mode",
        choices=("training", "inference"),
        default="training",
        help="forward and backward, or forward alone (default: training)",
    )
    profile.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)"
    )
    profile.add_argument("--backend", metavar="NAME", help="as for demo (default: auto)")
    profile.add_argument(
        "--out",
        type=Path,
        default=Path("profile-output"),
        metavar="FOLDER",
        help="folder for the files (default: profile-output)",
    )


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "demo", nargs="?", choices=("text", "series"), default="text", help="which (default: text)"
    )
    demo.add_argument(
        "--cell",
        choices=("rnn", "rnn-relu", "gru", "lstm"),
        default="gru",
        help="kind of recurrent layer (default: gru)",
    )
    for name, meaning in (
        ("hidden", "units of each recurrent layer"),
        ("layers", "recurrent layers"),
        ("steps", "training steps"),
        ("batch", "sequences in a batch"),
        ("seq_len", "length of a sequence: characters, or years to forecast from"),
    ):
        option = f"--{name.replace('_', '-')}"
        help_text = f"{meaning} ({_default_text(name)})"
        demo.add_argument(option, type=_positive_int, metavar="N", help=help_text)
    demo.add_argument(
        "--lr", type=_positive_float, metavar="X", help=f"Adam's step size ({_default_text('lr')})"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights and batches (default: 0)"
    )
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes the GPU if there is one (default: auto)",
    )
    demo.add_argument(
        "--backend",
        metavar="NAME",
        help=(
            "auto or one of the backends that info lists"
            " (default: TRITON_RNN_BACKEND if that is set, else auto)"
        ),
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="folder for the PNG and the JSON (default: demo-output)",
    )


def _default_text(name: str) -> str:
    values = " and ".join(f"{sizes[name]} for {demo}" for demo, sizes in _DEFAULTS.items())
    return f"default: {values}"


def _positive_int(text: str) -> int:
    # argparse turns a ValueError into a message that names this function, so raise its own error.
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 2**31 - 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
