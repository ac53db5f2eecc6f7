"""The demo: two specialists and a generalist become one model. See README.md."""
