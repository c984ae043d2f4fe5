python train.py --outdir=runs/late --nosubdir --data=datasets/digits.zip --precond=edm_distillation --transfer=assets/digits-student.pkl --weighting=late --batch=8 --duration=0.001 --tick=1
