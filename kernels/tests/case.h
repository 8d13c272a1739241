// One case, as a line of text:   attention query_heads=4 shifts=0,40 pieces=5:0:0,77:1:3 kv=int8 | its name
//
// Owns the line's form only; what the fields mean is told where they are read. A field that a case does not name, or a
// number that is none, is an error of the test's, not of the kernels': std::runtime_error.
#pragma once

#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

class Case {
 public:
  explicit Case(const std::string& line) {
    const std::size_t bar = line.find('|');
    std::istringstream words(line.substr(0, bar));
    words >> kind_;
    for (std::string word; words >> word;) {
      const std::size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::runtime_error("expected name=value, found '" + word + "'");
      fields_[word.substr(0, equals)] = word.substr(equals + 1);
    }
    name_ = bar == std::string::npos ? line : line.substr(line.find_first_not_of(' ', bar + 1));
  }

  const std::string& kind() const { return kind_; }
  const std::string& name() const { return name_; }

  const std::string& text(const std::string& field) const {
    const auto found = fields_.find(field);
    if (found == fields_.end()) throw std::runtime_error("expected a field '" + field + "', found none");
    return found->second;
  }
  double number(const std::string& field) const { return std::stod(text(field)); }
  std::int32_t integer(const std::string& field) const { return std::stoi(text(field)); }

  // Rows of integers: "1:2,3:4" is {{1, 2}, {3, 4}}, and nothing is {}.
  std::vector<std::vector<std::int32_t>> table(const std::string& field) const {
    std::vector<std::vector<std::int32_t>> rows;
    std::istringstream parts(text(field));
    for (std::string part; std::getline(parts, part, ',');) {
      rows.emplace_back();
      std::istringstream numbers(part);
      for (std::string one; std::getline(numbers, one, ':');) rows.back().push_back(std::stoi(one));
    }
    return rows;
  }
  std::vector<std::int32_t> integers(const std::string& field) const {
    std::vector<std::int32_t> list;
    for (const auto& row : table(field)) list.push_back(row.at(0));
    return list;
  }

 private:
  std::string kind_, name_;
  std::map<std::string, std::string> fields_;
};
