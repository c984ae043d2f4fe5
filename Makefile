# make demo   set everything up, then distil 16 -> 8 -> 4 -> 2 -> 1 on scikit-learn's handwritten digits
# make test   set everything up, then run the linters and the tests
# make env    only set up .venv

PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test test-slow lint clean

env: .venv/.ready

# Python's own version is checked first: everything later would fail in stranger ways.
.venv/.ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + " (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

# The demo is nothing but the commands a researcher types. Killed and started again, it resumes; to see it
# all again, remove runs/demo. Two processes of one thread each: small networks gain more from that than from two threads.
DEMO := runs/demo
TEACHER := $(DEMO)/teacher/network-snapshot-000050.pkl
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=2

demo: $(TEACHER) $(DEMO)/detector.pt
	@echo && echo "== Demo, 4 of 4: the ladder 16 -> 8 -> 4 -> 2 -> 1, every rung trained and measured =="
	$(TORCHRUN) distill.py --outdir=$(DEMO) --data=$(DEMO)/digits.zip --transfer=$(TEACHER) --num_steps=16 --until=1 \
	    --duration=0.07,0.03,0.03,0.03 --batch=64 --tick=5 --snap=2 --targets=2 --save-every=0.5 --seed=0 \
	    --detector=$(DEMO)/detector.pt --eval-num=2000 --eval-batch=125
	$(BIN)/python report.py $(DEMO)

$(DEMO)/digits.zip: | env
	@echo && echo "== Demo, 1 of 4: the data set. (The demo continues by itself; ignore the proposed next commands.) =="
	$(BIN)/python dataset_tool.py --source=digits --dest=$@

$(DEMO)/detector.pt: | $(DEMO)/digits.zip
	@echo && echo "== Demo, 3 of 4: features to measure with =="
	$(BIN)/python fid.py detector --data=$(DEMO)/digits.zip --dest=$@

$(TEACHER): | $(DEMO)/digits.zip
	@echo && echo "== Demo, 2 of 4: the teacher =="
	$(TORCHRUN) train.py --outdir=$(DEMO)/teacher --nosubdir --data=$(DEMO)/digits.zip --arch=ddpmpp \
	    --cbase=32 --cres=1,2 --blocks=1 --batch=64 --duration=0.05 --lr=2e-3 --warmup=0.005 --lr-decay=linear \
	    --dropout=0 --augment=0 --tick=10 --save-every=0.5 --seed=0

# The student that example.py brings along: a demo's 4-step one, in half precision (of the version it was made with).
assets/digits-student.pkl: demo
	$(BIN)/python -c 'from formats.network_files import load_network, save_network; \
	    student = load_network("$(DEMO)/stage-2-8to4/network-snapshot-000030.pkl"); \
	    save_network("$@", student.net, sampling=student.sampling, dataset_kwargs=student.dataset_kwargs, half=True)'

# In two processes: many tests wait for processes of their own. The tests of a file share what it sets up.
test: env lint
	$(BIN)/python -m pytest -n 2 --dist=loadfile

test-slow: env
	$(BIN)/python -m pytest -m slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
