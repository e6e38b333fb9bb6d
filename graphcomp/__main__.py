"""`python -m graphcomp`, and with it `torchrun … -m graphcomp`."""

from graphcomp.cli.main import main

main()
