"""python -m qncd_cli, and the command qncd"""

from .cli.process import receive_signals, run_alone


def main() -> None:
    receive_signals()
    from .cli.main import cli  # click and the rest: already interruptible

    run_alone(lambda: cli(prog_name="qncd"))


if __name__ == "__main__":
    main()
