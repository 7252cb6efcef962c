"""The models of collaborative filtering, a file each: `collab.model` names one. `sellarec.collab.model` says what one needs."""
