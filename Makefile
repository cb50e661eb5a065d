# check = what CI runs, in a fresh environment; test = the tests, in yours; fmt = format and fix;
# mutants = small changes to four modules that no test notices (needs cosmic-ray);
# soak = kill -9 and resume at 20 random instants; deployment = three SuperNodes on loopback, flwr as installed and 1.39.
# gpu = on a machine with CUDA: captured steps have the bits of others, their time and memory, and the contract on the device.
.PHONY: check test fmt soak mutants deployment gpu
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
gpu:
	-python -m pytest -n 0 tests/test_graphs.py
	-python -m benchmarks.engine
	-python -m benchmarks.gpu
	python -m pytest tests/test_contract.py
deployment:
	FEDKRSO_FLWR=1.39.0 pytest tests/test_deployment.py
