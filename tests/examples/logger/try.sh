python train.py --outdir=runs/csv --nosubdir --data=datasets/digits.zip --cbase=16 --cres=1,2 --blocks=1 --batch=8 --duration=0.001 --warmup=0 --tick=1 --csv
python -c "print(open('runs/csv/figures.csv').read().splitlines()[0])"
