# check = what CI runs, in a fresh environment; test = the tests, in yours; fmt = format and fix.
.PHONY: check test fmt
check:
	bash .ci/run
test:
	pytest
fmt:
	ruff format . && ruff check --fix .
