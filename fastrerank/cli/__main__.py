import sys

from fastrerank.cli import main

sys.exit(main())
