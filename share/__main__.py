"""Show what weights can do, and publish them.

    python -m share serve --weights runs/radit/weights --port 8000         a page to sample on, at 127.0.0.1
    python -m share push runs/radit ORG/NAME --metrics metrics.json        the weights on the Hugging Face Hub
"""
import argparse

from common import cli
from share import publish, serve


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serve.add_arguments(commands.add_parser("serve", help="a page to sample on, at 127.0.0.1"))
    publish.add_arguments(commands.add_parser("push", help="publish weights and a model card on the Hugging Face Hub"))
    args = parser.parse_args()
    if args.command == "serve":
        serve.serve_command(args)
    else:
        publish.push_command(args)


if __name__ == "__main__":
    cli.run(main)
