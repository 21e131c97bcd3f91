//! Many batches on many ranks: in each round, every rank makes the next batch, and all of them are handed over in order.
//!
//! The ranks go through a round step by step, so that none waits for another longer than a step takes, and all of them stop at the same one.

use super::{Batch, Finished, NotFinite, Progress, Request, ReverseProcess, SampleError, Sampler, room_for};
use crate::collective::{Collective, CollectiveError};
use crate::device::Device;

/// How a rank stands after a reverse step, as it tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stand {
    goes_on: bool,
    bad: Option<NotFinite>,
}

/// Numbers of images that are sent at a time: 4 MiB.
const PIECE: usize = 1 << 20;

/// What a rank says of itself: whether it goes on, whether an image is not finite, which one (u64), after which timestep (u32).
const WORD: usize = 1 + 1 + 8 + 4;

impl Stand {
    fn encode(self) -> Vec<u8> {
        let NotFinite { image, timestep } = self.bad.unwrap_or(NotFinite { image: 0, timestep: 0 });
        let flags = [u8::from(self.goes_on), u8::from(self.bad.is_some())];
        [&flags[..], &(image as u64).to_le_bytes(), &timestep.to_le_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Stand> {
        let [goes_on @ (0 | 1), is_bad @ (0 | 1), image @ .., t0, t1, t2, t3]: [u8; WORD] = bytes.try_into().ok()?
        else {
            return None;
        };
        let bad = NotFinite {
            image: usize::try_from(u64::from_le_bytes(image)).ok()?,
            timestep: u32::from_le_bytes([t0, t1, t2, t3]),
        };
        Some(Stand { goes_on: goes_on == 1, bad: (is_bad == 1).then_some(bad) })
    }

    /// Whether all ranks go on.
    ///
    /// # Errors
    /// An image that is not finite, at any of them.
    fn agree(self, collective: &mut dyn Collective) -> Result<bool, SampleError> {
        let mut goes_on = self.goes_on;
        let mut bad = self.bad;
        if collective.world_size() > 1 {
            for (rank, said) in collective.all_gather(self.encode())?.iter().enumerate() {
                let theirs = Stand::decode(said).ok_or_else(|| out_of_step(rank, "a reverse step".into(), said))?;
                goes_on &= theirs.goes_on;
                bad = bad.or(theirs.bad);
            }
        }
        match bad {
            Some(NotFinite { image, timestep }) => Err(SampleError::NotFinite { image, timestep }),
            None => Ok(goes_on),
        }
    }
}

impl Sampler {
    /// As [`Sampler::sample`], but hands each batch to `keep` as soon as it is finished, in order and at every rank, so that there may be
    /// more images than fit in memory. Gives the number of images finished: fewer than asked for if `observe` stopped it at some rank.
    ///
    /// # Errors
    /// Images that are not finite, initial noise of another size, a rank that is lost, and those of `keep`.
    pub fn sample_batches<E: From<SampleError>>(
        &self,
        device: &mut Device,
        collective: &mut dyn Collective,
        process: ReverseProcess<'_>,
        request: Request<'_>,
        mut observe: impl FnMut(Progress) -> bool,
        mut keep: impl FnMut(Finished<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let (rank, ranks) = (collective.rank(), collective.world_size());
        let image: usize = self.size.iter().product();
        let Request { count, initial_noise, .. } = request;
        if let Some(noise) = initial_noise
            && noise.len() != count * image
        {
            let ([height, width, channels], found, expected) = (self.size, noise.len(), count * image);
            return Err(SampleError::InitialNoise { found, expected, count, height, width, channels }.into());
        }
        let mut batch = self.room_for_batch(&request)?;
        let mut chain = self.load(device, &process)?;
        let (batches, steps) = (count.div_ceil(self.batch), process.table.steps.len());
        let of = batches.div_ceil(ranks) * steps;
        let mut done = 0;
        for first_of_round in (0..batches).step_by(ranks) {
            let number = first_of_round + rank;
            let mut all_go_on = true;
            let mut tell = |bad: Option<NotFinite>| {
                done += 1;
                all_go_on = Stand { goes_on: observe(Progress { done, of }), bad }.agree(collective)?;
                Ok(all_go_on)
            };
            let finished = if number < batches {
                self.make_batch(device, &mut chain, &request, number * self.batch, &mut batch, tell)?
            } else {
                // The others still have something to do, and may be stopped.
                let mut to_do = 0..steps;
                while to_do.next().is_some() && tell(None)? {}
                to_do.is_empty()
            };
            if !finished {
                return Ok(first_of_round * self.batch);
            }
            for maker in 0..ranks.min(batches - first_of_round) {
                let first = (first_of_round + maker) * self.batch;
                let wanted = (count - first).min(self.batch) * image;
                self.hand_over(collective, first, maker, &mut batch, wanted, &mut keep)?;
            }
            if !all_go_on {
                return Ok((first_of_round + ranks).saturating_mul(self.batch).min(count));
            }
        }
        Ok(count)
    }

    pub(super) fn room_for_batch(&self, request: &Request<'_>) -> Result<Batch, SampleError> {
        let elements = self.batch * self.size.iter().product::<usize>();
        let mut x = room_for(elements, "a batch")?;
        x.resize(elements, 0.0f32);
        let mut kept = Vec::new();
        for _ in 0..request.stages {
            kept.push(room_for(elements, "the stages of a batch")?);
        }
        Ok(Batch { x, t: vec![0; self.batch], kept })
    }

    /// Gives a finished batch, made by one rank, to `keep` at all of them.
    fn hand_over<E: From<SampleError>>(
        &self,
        collective: &mut dyn Collective,
        first: usize,
        maker: usize,
        batch: &mut Batch,
        wanted: usize,
        keep: &mut impl FnMut(Finished<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if collective.world_size() == 1 {
            return keep(Finished { first, images: &batch.x[..wanted], stages: &batch.kept });
        }
        let mine = collective.rank() == maker;
        let mut pass_on = |values: &[f32]| -> Result<Vec<f32>, SampleError> {
            let mut whole = room_for(wanted, "images of other ranks")?;
            for start in (0..wanted).step_by(PIECE) {
                let piece = start..(start + PIECE).min(wanted);
                let bytes = if mine { bytemuck::cast_slice(&values[piece.clone()]).to_vec() } else { Vec::new() };
                let all = collective.all_gather(bytes)?;
                if all[maker].len() != piece.len() * size_of::<f32>() {
                    return Err(out_of_step(maker, format!("{} numbers of images", piece.len()), &all[maker]).into());
                }
                whole.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&all[maker]));
            }
            Ok(whole)
        };
        let images = pass_on(&batch.x[..wanted])?;
        let mut stages = Vec::new();
        for kept in &batch.kept {
            stages.push(pass_on(kept)?);
        }
        keep(Finished { first, images: &images, stages: &stages })
    }
}

fn out_of_step(rank: usize, ours: String, theirs: &[u8]) -> CollectiveError {
    CollectiveError::OutOfStep { rank, ours, theirs: format!("{} bytes that are none", theirs.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stand_is_read_as_it_was_written() {
        for stand in [
            Stand { goes_on: true, bad: None },
            Stand { goes_on: false, bad: None },
            Stand { goes_on: true, bad: Some(NotFinite { image: 123_456_789_012, timestep: 999 }) },
        ] {
            assert_eq!(Stand::decode(&stand.encode()), Some(stand));
            assert_eq!(stand.encode().len(), WORD);
        }
        for bytes in [&[][..], &[1; WORD - 1], &[1; WORD + 1], &[2; WORD]] {
            assert_eq!(Stand::decode(bytes), None);
        }
    }
}
