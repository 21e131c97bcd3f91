//! Directories saved by diffusers itself (`tests/reference/diffusers_dir.py`), our own, and bad ones.

use super::*;
use crate::checkpoint::Layout;
use crate::diffusion::{BetaSchedule, DiffusionConfig, Objective, SamplerConfig, SamplerKind, Spacing, Variance};
use crate::unet::{TimestepForm, UnetConfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/diffusers_dir").join(name)
}

fn lsun256() -> UnetConfig {
    UnetConfig {
        channels: vec![128, 128, 256, 256, 512, 512],
        attention_levels: vec![4],
        dropout: 0.0,
        ..UnetConfig::default()
    }
}

/// A model as diffusers builds it: UNet2DModel's arguments, {name: shape}, number of tensors, number of parameters.
type Model = (Value, Option<BTreeMap<String, Vec<usize>>>, usize, usize);

#[test]
fn names_shapes_and_counts_are_those_of_diffusers() {
    let models: Vec<Model> = serde_json::from_slice(&fs::read(reference("names.json")).unwrap()).unwrap();
    let mut found = Vec::new();
    let tmp = tempfile::tempdir().unwrap();
    for (config, shapes, tensors, parameters) in models {
        let path = tmp.path().join("config.json");
        fs::write(&path, config.to_string()).unwrap();
        let keys = json::Keys::read(&path).unwrap();
        let (config, _) = unet::from_json(&keys).unwrap();
        assert!(keys.ignored().is_empty());
        let ours = expected_tensors(&config);
        let count = ours.iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
        assert_eq!((ours.len(), count), (tensors, parameters));
        if let Some(shapes) = shapes {
            assert_eq!(ours.into_iter().collect::<BTreeMap<_, _>>(), shapes);
        }
        found.push((config, tensors, parameters));
    }
    assert_eq!(found[0], (UnetConfig::default(), 328, 35_746_307));
    assert_eq!(found[1], (lsun256(), 450, 113_673_219));
    assert_eq!((&found[2].0.attention_levels[..], found[2].0.mid_attention), (&[0, 2][..], false));
    for (model, mid_groups) in [(&found[3].0, Some(0)), (&found[4].0, Some(16))] {
        assert_eq!((model.timestep, model.mid_attention_groups), (TimestepForm::ScaleShift, mid_groups));
    }
}

/// The fixture's weights as torch itself reordered them.
fn assert_tensors(found: &Imported, name: &str) {
    let bytes = fs::read(reference(&format!("{name}.expected.safetensors"))).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(found.tensors.len(), expected.len());
    for (name, view) in expected.iter() {
        let tensor = &found.tensors[name];
        let data: Vec<u8> = tensor.data.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!((&tensor.shape[..], &data[..]), (view.shape(), view.data()), "{name}");
    }
}

#[test]
fn a_pipeline_with_ddpm_scheduler_is_imported() {
    let found = import(&reference("f32")).unwrap();
    let config = UnetConfig {
        channels: vec![4, 8],
        blocks: 1,
        groups: 2,
        mid_attention_groups: Some(4),
        dropout: 0.25,
        ..UnetConfig::default()
    };
    assert_eq!((&found.unet, found.image_size, &found.ignored[..]), (&config, Some([8, 8]), &[][..]));
    let (diffusion, sampler) = found.scheduler.clone().unwrap();
    let expected = DiffusionConfig {
        timesteps: 400,
        schedule: BetaSchedule::Cosine,
        objective: Objective::V,
        clip: 2.0,
        ..DiffusionConfig::default()
    };
    assert_eq!(diffusion, expected);
    assert_eq!((sampler.sampler, sampler.steps, sampler.spacing), (SamplerKind::Ddpm, 400, Spacing::Trailing));
    assert_tensors(&found, "f32");
}

#[test]
fn half_weights_and_a_ddim_scheduler_are_imported() {
    let found = import(&reference("f16_ddim")).unwrap();
    assert_eq!((found.unet.head_channels, found.unet.image_channels, found.image_size), (2, 1, Some([4, 6])));
    assert!(found.unet.flip_sin_to_cos && found.unet.freq_shift == 0.0 && found.unet.norm_eps == 1e-5);
    let (diffusion, sampler) = found.scheduler.clone().unwrap();
    assert_eq!(diffusion.trained_betas.as_deref(), Some(&[0.1, 0.2, 0.3, 0.4, 0.5][..]));
    assert_eq!((diffusion.objective, diffusion.clip, diffusion.timesteps), (Objective::X0, 0.0, 5));
    assert_eq!((sampler.sampler, sampler.steps, sampler.steps_offset), (SamplerKind::Ddim, 5, 1));
    assert!(!sampler.final_alpha_one && sampler.uniform_stride);
    assert_tensors(&found, "f16_ddim");
}

#[test]
fn a_unet_alone_with_old_attention_names_is_imported_without_a_scheduler() {
    let found = import(&reference("old")).unwrap();
    assert!(found.scheduler.is_none() && found.tensors.contains_key("mid_block.attentions.0.to_out.0.weight"));
    assert_tensors(&found, "old");
}

/// A layout and values for a model, in an order unlike the files'.
fn model(config: &UnetConfig) -> (Layout, Vec<f32>) {
    let mut tensors = expected_tensors(config);
    tensors.reverse();
    let layout = Layout::packed(tensors.into_iter().map(|(n, s)| (n, our_shape(&s)))).unwrap();
    let mut values = vec![0.0; layout.elements()];
    for t in layout.tensors() {
        for i in t.range() {
            values[i] = (i as f32 * 0.7).sin();
        }
    }
    (layout, values)
}

#[test]
fn what_is_exported_is_imported() {
    let unet = UnetConfig {
        image_channels: 1,
        channels: vec![8, 12, 4],
        blocks: 2,
        attention_levels: vec![0, 2],
        mid_attention: false,
        head_channels: 4,
        groups: 4,
        mid_attention_groups: None,
        norm_eps: 1e-5,
        dropout: 0.3,
        timestep: TimestepForm::ScaleShift,
        flip_sin_to_cos: true,
        freq_shift: 0.5,
    };
    let diffusion = DiffusionConfig {
        timesteps: 3,
        schedule: BetaSchedule::ScaledLinear,
        trained_betas: Some(vec![0.1, 0.25, 1.0 / 3.0]),
        objective: Objective::X0,
        variance: Variance::FixedSmall,
        clip: 0.0,
        ..DiffusionConfig::default()
    };
    let sampler = SamplerConfig { spacing: Spacing::Linspace, steps_offset: 1, ..SamplerConfig::default() };
    let process = (&diffusion, &sampler);
    let (layout, values) = model(&unet);
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("a/b");
    export(&dir, &unet, [16, 12], process, &layout, &values).unwrap();
    let found = import(&dir).unwrap();
    assert_eq!((&found.unet, found.image_size, &found.ignored[..]), (&unet, Some([16, 12]), &[][..]));
    let (found_diffusion, found_sampler) = found.scheduler.as_ref().unwrap();
    assert_eq!(found_diffusion, &diffusion);
    assert_eq!((found_sampler.spacing, found_sampler.steps_offset), (Spacing::Linspace, 1));
    assert_eq!(found.flat(&layout).unwrap(), values);
    assert_eq!(fs::read_dir(tmp.path().join("a")).unwrap().count(), 1, "nothing temporary is left");
    assert!(matches!(export(&dir, &unet, [16, 12], process, &layout, &values), Err(DiffusersError::Exists { .. })));
    let short = Layout::packed([("conv_in.bias", vec![8])]).unwrap();
    let e = found.flat(&short).unwrap_err().to_string();
    assert!(e.contains("it also has"), "{e}");
    let e = export(&tmp.path().join("c"), &unet, [16, 12], process, &short, &[0.0; 64]).unwrap_err().to_string();
    assert!(e.contains("it has no tensor") && !tmp.path().join("c").exists(), "{e}");
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1, "nothing temporary is left");
}

/// diffusers leaves the norm of the middle attention away where the timestep scales and shifts, unless it is told its groups.
#[test]
fn the_norm_of_the_middle_attention_is_kept_in_both_forms() {
    use TimestepForm::{Add, ScaleShift};
    for (timestep, ours, theirs) in [
        (Add, None, Value::Null),
        (Add, Some(4), json!(4)),
        (ScaleShift, None, json!(2)),
        (ScaleShift, Some(4), json!(4)),
        (ScaleShift, Some(0), Value::Null),
    ] {
        let config = UnetConfig {
            channels: vec![4, 8],
            groups: 2,
            mid_attention_groups: ours,
            timestep,
            ..UnetConfig::default()
        };
        let written = unet::to_json(&config, [8, 8]);
        assert_eq!(written["attn_norm_num_groups"], theirs, "{timestep:?}, {ours:?}");
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("config.json");
        fs::write(&path, written.to_string()).unwrap();
        assert_eq!(unet::from_json(&json::Keys::read(&path).unwrap()).unwrap().0, config);
        let has_norm =
            expected_tensors(&config).iter().any(|(name, _)| name == "mid_block.attentions.0.group_norm.weight");
        assert_eq!(has_norm, ours != Some(0));
    }
}

/// A copy of a fixture in which one file's JSON is changed.
fn changed(file: &str, change: impl FnOnce(&mut Value)) -> Result<Imported, DiffusersError> {
    let tmp = tempfile::tempdir().unwrap();
    copy(&reference("f32"), tmp.path());
    let path = tmp.path().join(file);
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
    import(tmp.path())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::write(target, fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

const UNET_JSON: &str = "unet/config.json";
const SCHEDULER_JSON: &str = "scheduler/scheduler_config.json";

#[test]
fn what_cannot_be_expressed_is_refused_by_its_key() {
    for (file, key, value) in [
        (UNET_JSON, "_class_name", json!("UNet2DConditionModel")),
        (UNET_JSON, "down_block_types", json!(["ResnetDownsampleBlock2D", "AttnDownBlock2D"])),
        (UNET_JSON, "up_block_types", json!(["UpBlock2D", "AttnUpBlock2D"])),
        (UNET_JSON, "downsample_padding", json!(1)),
        (UNET_JSON, "resnet_time_scale_shift", json!("ada_group")),
        (UNET_JSON, "resnet_time_scale_shift", json!("spatial")),
        (UNET_JSON, "act_fn", json!("gelu")),
        (UNET_JSON, "time_embedding_type", json!("fourier")),
        (UNET_JSON, "time_embedding_dim", json!(7)),
        (UNET_JSON, "class_embed_type", json!("timestep")),
        (UNET_JSON, "num_class_embeds", json!(10)),
        (UNET_JSON, "mid_block_scale_factor", json!(1.4)),
        (UNET_JSON, "mid_block_type", Value::Null),
        (UNET_JSON, "downsample_type", json!("resnet")),
        (UNET_JSON, "upsample_type", json!("resnet")),
        (UNET_JSON, "center_input_sample", json!(true)),
        (UNET_JSON, "out_channels", json!(6)),
        (SCHEDULER_JSON, "_class_name", json!("PNDMScheduler")),
        (SCHEDULER_JSON, "variance_type", json!("learned_range")),
        (SCHEDULER_JSON, "variance_type", json!("fixed_small_log")),
        (SCHEDULER_JSON, "thresholding", json!(true)),
        (SCHEDULER_JSON, "rescale_betas_zero_snr", json!(true)),
        (SCHEDULER_JSON, "beta_schedule", json!("sigmoid")),
        (SCHEDULER_JSON, "prediction_type", json!("flow")),
        (SCHEDULER_JSON, "timestep_spacing", json!("karras")),
        (MODEL_INDEX, "vqvae", json!(["diffusers", "VQModel"])),
    ] {
        let found = value.to_string();
        match changed(file, |v| v[key] = value) {
            Err(e @ DiffusersError::Unsupported { .. }) => {
                let message = e.to_string();
                assert!(message.contains(file) && message.contains(key) && message.contains(&found), "{message}");
            }
            other => panic!("{key}: {other:?}"),
        }
    }
}

#[test]
fn values_that_nobody_can_mean_are_refused_by_their_key() {
    for (file, key, value) in [
        (UNET_JSON, "block_out_channels", json!([4, 1e300])),
        (UNET_JSON, "block_out_channels", json!([])),
        (UNET_JSON, "block_out_channels", json!("many")),
        (UNET_JSON, "layers_per_block", json!(u64::MAX)),
        (UNET_JSON, "layers_per_block", json!(-1)),
        (UNET_JSON, "norm_num_groups", json!(3)),
        (UNET_JSON, "norm_num_groups", json!(0)),
        (UNET_JSON, "norm_num_groups", Value::Null),
        (UNET_JSON, "attn_norm_num_groups", json!(5)),
        (UNET_JSON, "attn_norm_num_groups", json!(0)),
        (UNET_JSON, "resnet_time_scale_shift", json!(2)),
        (UNET_JSON, "attention_head_dim", json!(3)),
        (UNET_JSON, "attention_head_dim", json!(0)),
        (UNET_JSON, "norm_eps", json!(-1e-6)),
        (UNET_JSON, "dropout", json!(1)),
        (UNET_JSON, "freq_shift", json!("one")),
        (UNET_JSON, "sample_size", json!([8])),
        (UNET_JSON, "sample_size", json!(0)),
        (UNET_JSON, "sample_size", json!(7)), // two levels
        (UNET_JSON, "sample_size", json!([8, 8194])),
        (UNET_JSON, "sample_size", json!(1u64 << 40)),
        (UNET_JSON, "block_out_channels", json!([2, 1 << 17])),
        (UNET_JSON, "down_block_types", json!(["DownBlock2D"])),
        (SCHEDULER_JSON, "num_train_timesteps", json!(0)),
        (SCHEDULER_JSON, "num_train_timesteps", json!(1e15)),
        (SCHEDULER_JSON, "trained_betas", json!([0.1])),
        (SCHEDULER_JSON, "beta_end", json!(1.5)),
        (SCHEDULER_JSON, "clip_sample_range", json!(0)),
        (SCHEDULER_JSON, "steps_offset", json!(400)),
    ] {
        match changed(file, |v| v[key] = value.clone()) {
            Err(DiffusersError::BadValue { key: found, .. }) => assert_eq!(found, key),
            other => panic!("{key} {value}: {other:?}"),
        }
    }
    assert!(matches!(changed(UNET_JSON, |v| *v = json!([1])), Err(DiffusersError::Json { .. })));
}

#[test]
fn an_absent_key_has_the_default_of_diffusers_and_an_unknown_one_is_reported() {
    let remove = |key: &'static str| move |v: &mut Value| drop(v.as_object_mut().unwrap().remove(key));
    let e = changed(UNET_JSON, remove("downsample_padding")).unwrap_err().to_string();
    assert!(e.contains("downsample_padding is absent, which means 1 to diffusers"), "{e}");
    assert_eq!(changed(UNET_JSON, remove("norm_eps")).unwrap().unet.norm_eps, 1e-5);
    assert_eq!(changed(UNET_JSON, remove("freq_shift")).unwrap().unet.freq_shift, 0.0);
    assert!(changed(UNET_JSON, remove("flip_sin_to_cos")).unwrap().unet.flip_sin_to_cos);
    let (diffusion, _) = changed(SCHEDULER_JSON, remove("variance_type")).unwrap().scheduler.unwrap();
    assert_eq!(diffusion.variance, Variance::FixedSmall);
    let found = changed(SCHEDULER_JSON, |v| v["solver_order"] = json!(2)).unwrap();
    assert!(found.ignored[0].ends_with("scheduler_config.json: solver_order"));
}

#[test]
fn wrong_tensors_are_named_with_both_shapes() {
    let e = changed(UNET_JSON, |v| v["attn_norm_num_groups"] = Value::Null).map(|f| f.unet.mid_attention_groups);
    assert_eq!(e.unwrap(), None); // groups are not visible in the weights
    let message = changed(UNET_JSON, |v| v["add_attention"] = json!(false)).unwrap_err().to_string();
    let says = "mid_block.attentions.0.group_norm.bias of shape [8] is not a tensor of this model";
    assert!(message.contains(says) && message.contains("10 of its tensors"), "{message}");
    let message = changed(UNET_JSON, |v| v["in_channels"] = json!(1)).unwrap_err().to_string();
    assert!(message.contains("out_channels"), "{message}");
    let grey = |v: &mut Value| {
        v["in_channels"] = json!(1);
        v["out_channels"] = json!(1);
    };
    let message = changed(UNET_JSON, grey).unwrap_err().to_string();
    assert!(message.contains("conv_in.weight has shape [4, 3, 3, 3], expected [4, 1, 3, 3]"), "{message}");
    assert!(message.contains("conv_out.bias has shape [3], expected [1]"), "{message}");
    let message = changed(UNET_JSON, |v| v["layers_per_block"] = json!(2)).unwrap_err().to_string();
    assert!(message.contains("down_blocks.0.resnets.1.conv1.bias is missing, expected shape [4]"), "{message}");
}

#[test]
fn missing_and_damaged_files_are_named() {
    let with = |damage: &dyn Fn(&Path)| {
        let tmp = tempfile::tempdir().unwrap();
        copy(&reference("f32"), tmp.path());
        damage(tmp.path());
        import(tmp.path()).unwrap_err().to_string()
    };
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let message = with(&|d| fs::rename(d.join(weights), d.join("unet/diffusion_pytorch_model.bin")).unwrap());
    assert!(message.contains("diffusion_pytorch_model.bin") && message.contains("save_pretrained"), "{message}");
    let message = with(&|d| fs::remove_file(d.join(SCHEDULER_JSON)).unwrap());
    assert!(message.contains("scheduler_config.json is missing"), "{message}");
    for length in [0, 7, 100, 20_000] {
        let message = with(&|d| {
            let bytes = fs::read(d.join(weights)).unwrap();
            fs::write(d.join(weights), &bytes[..length]).unwrap();
        });
        assert!(message.contains(weights) && message.contains("damaged"), "{message}");
    }
    let message = with(&|d| fs::write(d.join(UNET_JSON), "{").unwrap());
    assert!(message.contains("config.json is not valid JSON"), "{message}");
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(import(empty.path()), Err(DiffusersError::NotDiffusers { .. })));
    assert!(!is_diffusers_dir(empty.path()) && is_diffusers_dir(&reference("f32")));
}

#[test]
fn the_first_published_pipelines_lie_in_one_directory() {
    let tmp = tempfile::tempdir().unwrap();
    for file in [MODEL_INDEX, UNET_JSON, SCHEDULER_JSON, "unet/diffusion_pytorch_model.safetensors"] {
        let from = reference("f32").join(file);
        fs::copy(&from, tmp.path().join(from.file_name().unwrap())).unwrap();
    }
    assert_tensors(&import(tmp.path()).unwrap(), "f32");
}
