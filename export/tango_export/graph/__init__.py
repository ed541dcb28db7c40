"""Graphs: how they are written, in which forms, and their files."""

from tango_export.graph.builder import Definition, Form, Graph, GraphBuilder, build
from tango_export.graph.forms import DEVICE, PORTABLE, TENSORRT

__all__ = ["DEVICE", "PORTABLE", "TENSORRT", "Definition", "Form", "Graph", "GraphBuilder", "build"]
