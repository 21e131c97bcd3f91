//! Many batches on many ranks: in each round, every rank makes the next batch, and all of them are handed over in order.

use super::{Batch, Finished, Progress, Request, ReverseProcess, SampleError, Sampler, room_for};
use crate::collective::{Collective, CollectiveError};
use crate::device::Device;

/// What became of a rank's batch in a round, as it tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It is finished; the rank goes on, or not.
    Done { goes_on: bool },
    /// There was none left for this rank.
    Idle,
    /// It was stopped on the way.
    Stopped,
    /// An image is not finite after a timestep.
    NotFinite { image: u64, timestep: u32 },
}

impl Outcome {
    fn encode(self) -> Vec<u8> {
        let (kind, image, timestep) = match self {
            Outcome::Done { goes_on: true } => (0, 0, 0),
            Outcome::Done { goes_on: false } => (1, 0, 0),
            Outcome::Idle => (2, 0, 0),
            Outcome::Stopped => (3, 0, 0),
            Outcome::NotFinite { image, timestep } => (4, image, timestep),
        };
        [&[kind][..], &image.to_le_bytes(), &timestep.to_le_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Outcome> {
        let (kind, rest) = bytes.split_first()?;
        let (image, timestep) = rest.split_first_chunk()?;
        let (image, timestep) = (u64::from_le_bytes(*image), u32::from_le_bytes(timestep.try_into().ok()?));
        Some(match kind {
            0 => Outcome::Done { goes_on: true },
            1 => Outcome::Done { goes_on: false },
            2 => Outcome::Idle,
            3 => Outcome::Stopped,
            4 => Outcome::NotFinite { image, timestep },
            _ => return None,
        })
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
        let batches = count.div_ceil(self.batch);
        let of = (rank..batches).step_by(ranks).len() * process.table.steps.len();
        let mut done = 0;
        for first_of_round in (0..batches).step_by(ranks) {
            let number = first_of_round + rank;
            let mut goes_on = true;
            let outcome = if number < batches {
                let made = self.make_batch(device, process, &request, number * self.batch, &mut batch, || {
                    done += 1;
                    goes_on = observe(Progress { done, of });
                    goes_on
                });
                match made {
                    Ok(true) => Outcome::Done { goes_on },
                    Ok(false) => Outcome::Stopped,
                    Err(SampleError::NotFinite { image, timestep }) => {
                        Outcome::NotFinite { image: image as u64, timestep }
                    }
                    Err(error) => return Err(error.into()),
                }
            } else {
                Outcome::Idle
            };
            let outcomes =
                if ranks == 1 { &[outcome][..] } else { &exchange(collective, outcome).map_err(SampleError::from)? };
            let mut stops = false;
            for (maker, outcome) in outcomes.iter().enumerate() {
                let number = first_of_round + maker;
                match *outcome {
                    Outcome::Done { goes_on } => {
                        let wanted = (count - number * self.batch).min(self.batch) * image;
                        self.hand_over(collective, number * self.batch, maker, &mut batch, wanted, &mut keep)?;
                        stops |= !goes_on;
                    }
                    Outcome::Idle => {}
                    Outcome::Stopped => return Ok(number * self.batch),
                    Outcome::NotFinite { image, timestep } => {
                        return Err(SampleError::NotFinite { image: image as usize, timestep }.into());
                    }
                }
            }
            if stops {
                return Ok((first_of_round + ranks).min(batches).saturating_mul(self.batch).min(count));
            }
        }
        Ok(count)
    }

    fn room_for_batch(&self, request: &Request<'_>) -> Result<Batch, SampleError> {
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
            let bytes = if mine { bytemuck::cast_slice(values).to_vec() } else { Vec::new() };
            let all = collective.all_gather(bytes)?;
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(&all[maker]);
            match values.len() == wanted {
                true => Ok(values),
                false => Err(out_of_step(maker, format!("{wanted} numbers of images"), &all[maker]).into()),
            }
        };
        let images = pass_on(&batch.x[..wanted])?;
        let mut stages = Vec::new();
        for kept in &batch.kept {
            stages.push(pass_on(kept)?);
        }
        keep(Finished { first, images: &images, stages: &stages })
    }
}

/// What became of the batches of all ranks.
fn exchange(collective: &mut dyn Collective, mine: Outcome) -> Result<Vec<Outcome>, CollectiveError> {
    let all = collective.all_gather(mine.encode())?;
    let decoded = |(rank, bytes): (usize, &Vec<u8>)| {
        Outcome::decode(bytes).ok_or_else(|| out_of_step(rank, "the outcome of a round".into(), bytes))
    };
    all.iter().enumerate().map(decoded).collect()
}

fn out_of_step(rank: usize, ours: String, theirs: &[u8]) -> CollectiveError {
    CollectiveError::OutOfStep { rank, ours, theirs: format!("{} bytes that are none", theirs.len()) }
}
