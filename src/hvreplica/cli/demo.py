import click

from hvreplica.cli.options import verb


@click.command()
@verb
def demo(output):
    """X"""
