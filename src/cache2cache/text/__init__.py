"""Text to tokens, and tokens of one side to tokens of the other."""

from cache2cache.text.align import align
from cache2cache.text.chat import TEMPLATES, check, render
from cache2cache.text.retokenise import Retokenised, Section, retokenise, retokenise_text

__all__ = ["TEMPLATES", "Retokenised", "Section", "align", "check", "render", "retokenise", "retokenise_text"]
