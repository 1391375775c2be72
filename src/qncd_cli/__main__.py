"""python -m qncd_cli"""

from .cli.main import cli

if __name__ == "__main__":
    cli(prog_name="qncd")
