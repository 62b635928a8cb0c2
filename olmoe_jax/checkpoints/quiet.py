"""Keeps Orbax's own log lines off the console: what a person must know, our errors say."""

import logging

from absl import logging as absl_logging


def _is_not_of_orbax(record) -> bool:
    return "/orbax/" not in record.pathname.replace("\\", "/") or absl_logging.get_verbosity() > 0


def silence_orbax():
    """Drops what Orbax logs, unless absl's verbosity is at debug."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)  # adding it twice changes nothing
