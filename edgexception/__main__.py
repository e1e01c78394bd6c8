"""`python -m edgexception` is `edgex`."""

from edgexception.cli import main

main()
