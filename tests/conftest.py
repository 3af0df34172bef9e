"""Shared set-up: tests share two cores with others, so torch gets one; and the command line, called in process."""

import pytest
import torch

from sharpscope import cli

torch.set_num_threads(1)


@pytest.fixture
def run(capsys):
    """Run a command; return exit code, stdout and stderr."""

    def called(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.app([str(argument) for argument in arguments], prog_name="sharpscope")
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return called
