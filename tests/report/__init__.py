"""Tests of the tables and the page."""
