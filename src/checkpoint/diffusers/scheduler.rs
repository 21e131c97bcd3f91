//! `scheduler/scheduler_config.json`: diffusers' DDPMScheduler and DDIMScheduler.

use super::DIFFUSERS_VERSION;
use super::error::DiffusersError;
use super::json::Keys;
use crate::diffusion::{
    BETA_RANGE, BetaSchedule, DiffusionConfig, MAX_TIMESTEPS, Objective, SamplerConfig, SamplerKind, Spacing, Variance,
    is_beta,
};
use serde_json::{Value, json};
use std::fmt::Debug;

const SCHEDULES: [(&str, BetaSchedule); 3] = [
    ("linear", BetaSchedule::Linear),
    ("scaled_linear", BetaSchedule::ScaledLinear),
    ("squaredcos_cap_v2", BetaSchedule::Cosine),
];
const OBJECTIVES: [(&str, Objective); 3] =
    [("epsilon", Objective::Epsilon), ("sample", Objective::X0), ("v_prediction", Objective::V)];
const VARIANCES: [(&str, Variance); 2] = [("fixed_large", Variance::FixedLarge), ("fixed_small", Variance::FixedSmall)];
const SPACINGS: [(&str, Spacing); 3] =
    [("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Linspace)];
const KINDS: [(&str, SamplerKind); 2] = [("DDPMScheduler", SamplerKind::Ddpm), ("DDIMScheduler", SamplerKind::Ddim)];

/// The steps diffusers' DDIMPipeline takes when it is not told.
const DDIM_STEPS: usize = 50;

/// diffusers' name of a value. What has none there cannot be exported: any other would make other images.
fn name_of<T: PartialEq + Debug>(table: &[(&'static str, T)], value: &T) -> Result<&'static str, DiffusersError> {
    let entry = table.iter().find(|(_, v)| v == value);
    entry.map(|(name, _)| *name).ok_or_else(|| DiffusersError::Model(format!("diffusers has no {value:?}")))
}

/// All of DDPMScheduler's arguments.
pub(super) fn to_json(config: &DiffusionConfig, sampler: &SamplerConfig) -> Result<Value, DiffusersError> {
    Ok(json!({
        "_class_name": "DDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": name_of(&SCHEDULES, &config.schedule)?,
        "trained_betas": config.trained_betas,
        "variance_type": name_of(&VARIANCES, &config.variance)?,
        "clip_sample": config.clip > 0.0,
        "clip_sample_range": if config.clip > 0.0 { config.clip } else { 1.0 },
        "prediction_type": name_of(&OBJECTIVES, &config.objective)?,
        "thresholding": false,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": name_of(&SPACINGS, &sampler.spacing)?,
        "steps_offset": sampler.steps_offset,
        "rescale_betas_zero_snr": false,
    }))
}

/// The process and the sampler that a pipeline with this scheduler runs by default.
pub(super) fn from_json(keys: &Keys) -> Result<(DiffusionConfig, SamplerConfig), DiffusersError> {
    let sampler = choice(keys, "_class_name", "", &KINDS, "other solvers are not implemented")?;
    keys.only("thresholding", json!(false), json!(false), "x_0 is clipped to a fixed range")?;
    keys.only("rescale_betas_zero_snr", json!(false), json!(false), "the last step keeps some signal")?;
    for key in ["dynamic_thresholding_ratio", "sample_max_value"] {
        keys.get(key); // of thresholding only
    }
    let variance = match sampler {
        SamplerKind::Ddpm => {
            choice(keys, "variance_type", "fixed_small", &VARIANCES, "variances are fixed, not learned")?
        }
        // DDIM's variance is that of η; β̃ at η = 1.
        SamplerKind::Ddim => Variance::FixedSmall,
    };
    let timesteps = keys.count("num_train_timesteps", 1000)?;
    if timesteps == 0 || timesteps > MAX_TIMESTEPS {
        return Err(keys.bad_value("num_train_timesteps", &format!("1 to {MAX_TIMESTEPS}")));
    }
    let clip = match (keys.flag("clip_sample", true)?, keys.number("clip_sample_range", 1.0)?) {
        (true, range) if range > 0.0 && range.is_finite() => range,
        (true, _) => return Err(keys.bad_value("clip_sample_range", "a number above 0")),
        (false, _) => 0.0,
    };
    let diffusion = DiffusionConfig {
        timesteps,
        schedule: choice(keys, "beta_schedule", "linear", &SCHEDULES, "other schedules are not implemented")?,
        beta_start: beta(keys, "beta_start", 1e-4)?,
        beta_end: beta(keys, "beta_end", 0.02)?,
        trained_betas: trained_betas(keys, timesteps)?,
        objective: choice(keys, "prediction_type", "epsilon", &OBJECTIVES, "nothing else can be predicted")?,
        variance,
        clip,
    };
    let sampler = SamplerConfig {
        sampler,
        steps: match sampler {
            SamplerKind::Ddpm => timesteps,
            SamplerKind::Ddim => timesteps.min(DDIM_STEPS),
        },
        eta: 0.0,
        spacing: choice(keys, "timestep_spacing", "leading", &SPACINGS, "other spacings are not implemented")?,
        steps_offset: keys.count("steps_offset", 0)?,
        final_alpha_one: match sampler {
            SamplerKind::Ddpm => true,
            SamplerKind::Ddim => keys.flag("set_alpha_to_one", true)?,
        },
        // Also where DDIM is asked for in place of this scheduler: diffusers would make its DDIMScheduler from the same file.
        uniform_stride: true,
    };
    if sampler.steps_offset >= timesteps {
        return Err(keys.bad_value("steps_offset", &format!("less than num_train_timesteps = {timesteps}")));
    }
    Ok((diffusion, sampler))
}

fn choice<T: Copy>(
    keys: &Keys,
    key: &'static str,
    default: &str,
    table: &[(&'static str, T)],
    why: &str,
) -> Result<T, DiffusersError> {
    let name = keys.text(key, default)?;
    table.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<_> = table.iter().map(|(name, _)| *name).collect();
        keys.unsupported(key, &json!(default), &known.join(" or "), why)
    })
}

fn beta(keys: &Keys, key: &'static str, default: f64) -> Result<f64, DiffusersError> {
    let value = keys.number(key, default)?;
    if is_beta(value) { Ok(value) } else { Err(keys.bad_value(key, &format!("a number {BETA_RANGE}"))) }
}

fn trained_betas(keys: &Keys, timesteps: usize) -> Result<Option<Vec<f64>>, DiffusersError> {
    const KEY: &str = "trained_betas";
    let expected = format!("null or num_train_timesteps = {timesteps} numbers {BETA_RANGE}");
    if matches!(keys.get(KEY), None | Some(Value::Null)) {
        return Ok(None);
    }
    let betas = keys.list(KEY, &expected, Vec::new(), |v| v.as_f64().filter(|&x| is_beta(x)))?;
    if betas.len() == timesteps { Ok(Some(betas)) } else { Err(keys.bad_value(KEY, &expected)) }
}
