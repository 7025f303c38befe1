"""``python -m aniso_ext.cli``: the same program as ``aniso``."""

from aniso_ext.cli.main import main

main()
