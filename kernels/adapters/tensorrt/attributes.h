// An operator's attributes, by name: integers, and for some a scale.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace streamo::tensorrt {

using namespace nvinfer1;

// One operator's attributes, by name; as they come from a graph and as they are kept in an engine.
class Attributes {
 public:
  explicit Attributes(std::vector<char const*> const& integers, bool has_scale) {
    for (char const* name : integers) names_.push_back(name);
    integers_.assign(names_.size(), -1);
    for (char const* name : integers) fields_.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    if (has_scale) fields_.emplace_back("scale", nullptr, PluginFieldType::kFLOAT32, 1);
    point_fields();
  }
  Attributes(Attributes const& other)
      : names_(other.names_), integers_(other.integers_), scale_(other.scale_), fields_(other.fields_) {
    point_fields();
  }
  Attributes& operator=(Attributes const&) = delete;

  // Whether every attribute was there.
  bool read(PluginFieldCollection const& given) {
    for (int32_t i = 0; i < given.nbFields; ++i) take(given.fields[i]);
    for (int32_t value : integers_) {
      if (value < 0) return false;
    }
    return fields_.size() == names_.size() || scale_ > 0;
  }

  int32_t operator[](char const* name) const {
    for (size_t i = 0; i < names_.size(); ++i) {
      if (!std::strcmp(names_[i], name)) return integers_[i];
    }
    return -1;
  }
  float scale() const { return scale_; }
  PluginFieldCollection const* fields() const { return &collection_; }

 private:
  void take(PluginField const& field) {
    if (!field.data || field.length < 1) return;
    if (!std::strcmp(field.name, "scale") && field.type == PluginFieldType::kFLOAT32) {
      std::memcpy(&scale_, field.data, sizeof scale_);
    }
    for (size_t i = 0; i < names_.size(); ++i) {
      if (std::strcmp(names_[i], field.name)) continue;
      if (field.type == PluginFieldType::kINT32) std::memcpy(&integers_[i], field.data, sizeof(int32_t));
      if (field.type == PluginFieldType::kINT64) {
        int64_t wide;
        std::memcpy(&wide, field.data, sizeof wide);
        integers_[i] = static_cast<int32_t>(wide);
      }
    }
  }
  void point_fields() {
    for (size_t i = 0; i < fields_.size(); ++i) {
      fields_[i].data = i < integers_.size() ? static_cast<void const*>(&integers_[i]) : &scale_;
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  std::vector<char const*> names_;
  std::vector<int32_t> integers_;
  float scale_ = 0;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

}  // namespace streamo::tensorrt
