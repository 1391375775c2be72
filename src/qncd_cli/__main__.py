"""python -m qncd_cli, and the command qncd"""

from .cli.main import cli
from .cli.process import run_alone


def main() -> None:
    run_alone(lambda: cli(prog_name="qncd"))


if __name__ == "__main__":
    main()
