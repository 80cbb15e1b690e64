"""stub"""

from pathlib import Path


def write_report(folder):
    return folder


def as_json(trials):
    return []
