# check = what CI runs, in a fresh environment; test = the tests, in yours; fmt = format and fix;
# mutants = small changes to four modules that no test notices (needs cosmic-ray);
# soak = kill -9 and resume at 20 random instants; deployment = three SuperNodes on loopback, flwr as installed and 1.39.
.PHONY: check test fmt soak mutants deployment
check:
	bash .ci/run
test:
	pytest
fmt:
	ruff format . && ruff check --fix .
soak:
	python tests/soak.py
mutants:
	python tests/mutants.py
deployment:
	FEDKRSO_FLWR=1.39.0 pytest tests/test_deployment.py
