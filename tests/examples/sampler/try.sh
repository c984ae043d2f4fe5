python train.py --outdir=runs/tiny --nosubdir --data=datasets/digits.zip --cbase=16 --cres=1,2 --blocks=1 --batch=8 --duration=0.001 --warmup=0 --tick=1
python generate.py --network=runs/tiny/network-snapshot-000001.pkl --outdir=runs/ab2 --seeds=0-3 --steps=8 --solver=ab2
