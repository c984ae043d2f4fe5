python train.py --outdir=runs/plain --nosubdir --data=datasets/digits.zip --arch=plain --cbase=16 --cond=1 --batch=8 --duration=0.001 --warmup=0 --tick=1
python train.py --outdir=runs/plain-4to2 --nosubdir --data=datasets/digits.zip --precond=edm_distillation --num_steps=4 --transfer=runs/plain/network-snapshot-000001.pkl --batch=8 --duration=0.001 --tick=1
python generate.py --network=runs/plain-4to2/network-snapshot-000001.pkl --outdir=runs/plain-images --seeds=0-3
