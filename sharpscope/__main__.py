"""``python -m sharpscope`` is the command ``sharpscope``."""

from sharpscope.cli import main

main()
