"""Graphs: how they are written, in which forms, and their files."""

from tango_export.graph.builder import Definition, Graph, GraphBuilder, build
from tango_export.graph.forms import DEVICE, PORTABLE, TENSORRT

__all__ = ["DEVICE", "PORTABLE", "TENSORRT", "Definition", "Graph", "GraphBuilder", "build"]
