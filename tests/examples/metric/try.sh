python generate.py --network=assets/digits-student.pkl --outdir=runs/images --seeds=0-15
python fid.py nearest --images=runs/images --data=datasets/digits.zip
