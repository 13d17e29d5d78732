"""Prompts: templates as data, and the compiler that makes token ids and spans of them."""

from fastrerank.inputs.prompts.template import Message, Template, list_templates, parse_format

__all__ = ["Message", "Template", "list_templates", "parse_format"]
